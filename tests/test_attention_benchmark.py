"""What ``benchmarks/gpu_attention.py`` does without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_attention
from benchmarks.gpu_attention import SHAPES, Result, ratios


def test_tiny_shapes_give_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    gpu_attention.main(["--tiny", "--only", "S", "--json", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["method"] for row in rows} == {"torch's default", "ours fp8", "ours int8", "ours short"}
    assert [row for row in rows if row["failure"]] == []
    worst = {name: max(row["error"] for row in rows if row["method"] == name) for name in ("ours fp8", "ours int8")}
    assert 0.001 < worst["ours int8"] < worst["ours fp8"] < 0.06
    printed = capsys.readouterr().out
    assert "geometric mean" in printed and "times mean nothing" in printed


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        gpu_attention.main([])


def test_ratios_are_to_the_fastest_in_float() -> None:
    results = [Result("a", "cuDNN", 1, 2.0, 0), Result("a", "flash", 1, 3.0, 0), Result("a", "ours fp8", 1, 1.0, 0)]
    results += [Result("b", "cuDNN", 1, failure="it cannot"), Result("b", "ours fp8", 1, 1.0, 0)]
    assert ratios(results) == {"cuDNN": [1], "flash": [2 / 3], "ours fp8": [2]}


def test_shapes_differ() -> None:
    assert len(set(map(str, SHAPES))) == len(SHAPES)
