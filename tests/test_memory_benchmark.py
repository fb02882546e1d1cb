"""What the benchmark of GPU memory shows of recorded cells, and what it keeps of phases that fail. No GPU is needed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import memory_cell
from benchmarks.cells import last_object
from benchmarks.memory import parser, title_of
from benchmarks.memory_tables import notes, overall, ratio, read, show, shown_phase
from benchmarks.models import build
from benchmarks.peak_memory import Watch

TITLE = "SD1.5, 512x512, batch 2, float16"
SECONDS = {f"{name}_seconds": 1.5 for name in ("load", "compile", "lora", "unlora", "second")}
CAPPED = {"failures": {"compile": "out of memory"}, "phases": {"load": None, "observe": None}}


def cell(reserved: float, **changes: Any) -> dict[str, Any]:
    """A cell, where each phase takes the more the later it is."""
    names = changes.pop("phases", memory_cell.PHASES)
    sizes = {name: reserved - 0.1 * (len(memory_cell.PHASES) - place) for place, name in enumerate(names, 1)}
    phases = {
        name: {"allocated": size - 0.5, "reserved": size, "process": size + 0.5, "host": 2.0}
        for name, size in sizes.items()
    }
    times = {"ms": {"median": 12.34, "low": 12.0, "high": 13.0}, "relative_error": 0.0312, "weights_change": 1e-4}
    return {"source": "NVML", "phases": phases, "failures": {}, **SECONDS, **times, **changes}


CELLS = {
    "onlinequant": cell(5.0, report={"layers": 76, "precision": "fp8", "phase": "quantized", "phase_reason": ""}),
    "torch.compile": cell(4.0),
    "torchao": cell(4.5, failures={"LoRA": "NotImplementedError: aten.add_"}),
    "onlinequant half": cell(3.0, **CAPPED),
    "eager": {"failed": "exit status 1"},
}


def shown(path: Path) -> str:
    """What ``--show`` prints."""
    console = Console(width=190, file=io.StringIO())
    for title, cells in read(path).items():
        show(console, title, cells)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_recorded_cells_are_shown_in_the_order_of_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    lines = [{"title": TITLE, "column": column, **cell} for column, cell in CELLS.items()]
    stale = {"title": TITLE, "column": "torch.compile", "failed": "took too long"}
    path.write_text("\n".join(map(json.dumps, [stale, *lines])))
    text = shown(path)
    firsts = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert firsts[:5] == ["eager", "torch.compile", "torchao", "onlinequant", "onlinequant half"]
    assert firsts[5:] == firsts[1:5]  # the second table leaves out what measured nothing
    for part in ("exit status 1", "4.50 / 5.00 / 5.50", "1.25x", "76 fp8", "12.3", "0.0312", "out of memory", "NVML"):
        assert part in text
    assert "torchao: LoRA: NotImplementedError: aten.add_" in text
    assert "took too long" not in text


def test_a_phase_is_shown_with_its_peaks_or_what_became_of_it() -> None:
    half, ao = CELLS["onlinequant half"], {**CELLS["torchao"], "phases": {}}
    assert [shown_phase(half, name) for name in ("load", "compile", "run")] == [
        "2.00 / 2.50 / 3.00",
        "out of memory",
        None,
    ]
    assert shown_phase(ao, "LoRA") == "failed" and not notes(half)
    report = {"phase": "float", "phase_reason": "no layer was selected"}
    assert notes({"report": report, "notes": ["took more than 5 s"]}) == [
        "ran in float: no layer was selected",
        "took more than 5 s",
    ]


def test_peaks_are_compared_only_where_all_phases_were_measured() -> None:
    base = CELLS["torch.compile"]
    assert overall(base, "reserved") == 4.0
    assert ratio(CELLS["onlinequant"], base, "reserved") == "1.25x"
    assert ratio(CELLS["torchao"], base, "process") == "1.11x"
    for one, other in (("onlinequant half", base), ("eager", base)):
        assert ratio(CELLS[one], other, "reserved") == ""
    assert ratio(base, {}, "reserved") == ""
    assert ratio(base, {**base, "failed": "exit status 1"}, "reserved") == ""


def test_a_phase_that_fails_is_named_and_earlier_ones_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {"phases": {}, "failures": {}}
    phase = memory_cell.Phases(found, Watch("cpu"))
    with phase("load"):
        pass
    with phase("LoRA"):
        raise NotImplementedError("aten.add_\nand more")
    with pytest.raises(RuntimeError), phase("run"):
        raise RuntimeError("InductorError: OutOfMemoryError: CUDA out of memory. Tried")
    assert list(found["phases"]) == ["load"]
    assert found["phases"]["load"]["host"] > 0 and found["phases"]["load"]["process"] == 0
    assert found["failures"] == {"LoRA": "NotImplementedError: aten.add_", "run": "out of memory"}
    printed = capsys.readouterr().out
    assert last_object(printed, "exit status 1", enough="phases")["notes"] == ["exit status 1"]
    assert last_object(printed, "exit status 1", enough=None)["failed"] == "exit status 1"


def test_a_lora_is_added_and_removed() -> None:
    model, inputs = build("flux", "cpu", torch.float32, 1, size=(8, 8), config=memory_cell.ROWS["flux"].tiny)
    weights = memory_cell.projections(model)
    assert len(weights) == 4 + 3 and inputs["hidden_states"].shape == (1, 16, 64)
    before = {name: module.weight.clone() for name, module in weights.items()}
    lora = memory_cell.Lora(model, "cpu")
    with torch.no_grad():
        lora.add(1.0)
        changes = [
            float((module.weight - before[name]).norm() / before[name].norm()) for name, module in weights.items()
        ]
        lora.add(-1.0)
    assert all(0.02 < change < 0.2 for change in changes)
    for name, module in weights.items():
        torch.testing.assert_close(module.weight, before[name], rtol=0, atol=1e-7)


def test_a_cap_is_part_of_the_title() -> None:
    assert title_of("sd15", parser().parse_args([])) == TITLE
    assert title_of("sd15", parser().parse_args(["--capped", "8"])) == f"{TITLE}, at most 8 GiB"


def test_flux_has_the_tokens_of_its_picture() -> None:
    model, inputs = build("flux", "meta", torch.bfloat16, 1, config=memory_cell.ROWS["flux"].tiny)
    assert model(**inputs)[0].shape == (1, 4096, 64)
    assert inputs["encoder_hidden_states"].shape == (1, 512, 4096) and inputs["img_ids"].shape == (4096, 3)


def test_wan_has_the_tokens_of_its_video() -> None:
    model, inputs = build("wan", "meta", torch.bfloat16, 1, config=memory_cell.ROWS["wan"].tiny)
    assert model(**inputs)[0].shape == inputs["hidden_states"].shape == (1, 16, 21, 60, 104)
    assert len(memory_cell.projections(model)) == 2 * 4


def test_what_is_not_known_is_not_shown() -> None:
    peaks = {"allocated": 1.5, "reserved": 2.0, "process": 0.0, "host": 1.0}
    assert shown_phase({"phases": {"load": peaks}, "failures": {}}, "load") == "1.50 / 2.00"
