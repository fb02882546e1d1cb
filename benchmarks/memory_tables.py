"""The tables of ``memory``: what the phases of each column take, and how all of it compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_step_cell import COMPILED
from benchmarks.memory_cell import COLUMNS, LORA, OUT_OF_MEMORY, PHASES

Cells = dict[str, dict[str, Any]]
_SECONDS = {"load": "load s", "observe": "observe s", "compile": "compile s", "lora": "LoRA s", "unlora": "removed s"}


def phases_table(title: str, cells: Cells) -> Table:
    """What every phase took at most. A phase that failed says so, and those that were not reached are empty."""
    result = Table(title=f"{title}: allocated / reserved / process, GiB")
    for heading in ("", *PHASES):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for column, cell in cells.items():
        if "phases" in cell:
            result.add_row(column, *(shown_phase(cell, phase) for phase in PHASES))
        else:
            result.add_row(column, cell["failed"])
    return result


def shown_phase(cell: dict[str, Any], phase: str) -> str | None:
    """One entry of ``phases_table``."""
    peaks = cell["phases"].get(phase)
    if peaks is None:
        reason = cell["failures"].get(phase)
        return reason if reason in (None, OUT_OF_MEMORY) else "failed"
    return " / ".join(f"{peaks[name]:.2f}" for name in ("allocated", "reserved", "process") if peaks[name])


def whole_table(title: str, cells: Cells) -> Table:
    """The peaks of all phases, over those of torch.compile, the times, and what became of results and weights."""
    result = Table(title=f"{title}: all phases")
    headings = ["", "reserved", "to compile", "process", "to compile", "host", *_SECONDS.values(), "2nd size s"]
    headings += ["call ms", "relative error", "weights after", "8-bit layers"]
    for heading in headings:
        result.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    base = cells.get(COMPILED, {})
    for column, cell in cells.items():
        if not cell.get("phases"):
            continue
        times = [
            f"{cell[f'{name}_seconds']:.2f}" if f"{name}_seconds" in cell else "" for name in (*_SECONDS, "second")
        ]
        result.add_row(
            column,
            *(text for name in ("reserved", "process") for text in (peak(cell, name), ratio(cell, base, name))),
            peak(cell, "host"),
            *times,
            f"{cell['ms']['median']:.1f}" if "ms" in cell else "",
            f"{cell['relative_error']:.4f}" if "relative_error" in cell else "",
            f"{cell['weights_change']:.2g}" if "weights_change" in cell else "",
            "{layers} {precision}".format(**cell["report"]) if "report" in cell else "",
        )
    return result


def overall(cell: dict[str, Any], name: str) -> float:
    """The largest of the phases' peaks."""
    return max(peaks[name] for peaks in cell["phases"].values())


def peak(cell: dict[str, Any], name: str) -> str:
    return f"{overall(cell, name):.2f}"


def ratio(cell: dict[str, Any], base: dict[str, Any], name: str) -> str:
    """Over ``base``. Empty where either was ended by a failure, or there is nothing to compare."""
    if any(not each.get("phases") or has_ended_early(each) for each in (cell, base)) or not overall(base, name):
        return ""
    return f"{overall(cell, name) / overall(base, name):.2f}x"


def has_ended_early(cell: dict[str, Any]) -> bool:
    """Whether a failure kept phases from being measured. A LoRA that cannot be added alone does not."""
    return "failed" in cell or bool(set(cell["failures"]) - {LORA}) or OUT_OF_MEMORY in cell["failures"].values()


def show(console: Console, title: str, cells: Cells) -> None:
    """Everything about one model."""
    cells = {column: cells[column] for column in COLUMNS if column in cells}
    console.print(phases_table(title, cells))
    console.print(whole_table(title, cells))
    sources = sorted({cell["source"] for cell in cells.values() if "source" in cell})
    console.print(f"process: according to {', '.join(sources) or 'nobody'}")
    for column, cell in cells.items():
        for note in notes(cell):
            console.print(f"{column}: {note}", markup=False, highlight=False)


def notes(cell: dict[str, Any]) -> list[str]:
    """What went wrong, beside a lack of memory."""
    failures = cell.get("failures", {}).items()
    result = [f"{phase}: {reason}" for phase, reason in failures if reason != OUT_OF_MEMORY]
    report = cell.get("report", {"phase": "quantized"})
    if report["phase"] != "quantized":
        result.append(f"ran in float: {report['phase_reason']}")
    return [*result, *cell.get("notes", ())]


def read(path: Path) -> dict[str, Cells]:
    """The cells that ``--json`` wrote, by title and column; of those measured again the last."""
    tables: dict[str, Cells] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        tables.setdefault(cell["title"], {})[cell["column"]] = cell
    return tables
