from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from onlinequant_backend import demo
from onlinequant_backend.report import STATS_FILE, Report
from tests.tiny import Net


class Denoiser(Net):
    """A ``Net`` that is called as diffusers' UNets are."""

    def forward(self, sample: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:  # type: ignore[override]
        return (super().forward(sample),)


def ran(output: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Report]:
    """What the demo prints for a tiny model, and its report. torch.compile's own column compiles nothing: it's slow."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, backend="eager", **more: compile_(model, backend=backend, **more)
    )
    monkeypatch.setattr(demo, "build_unet", lambda channels: Denoiser(channels[0]).eval().requires_grad_(False))
    text = io.StringIO()
    console = Console(file=text, width=80)
    report = demo.run(output, channels=(16,), size=16, steps=2, calibration_steps=2, console=console)
    return text.getvalue(), report


def test_the_demo_measures_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, report = ran(tmp_path / "out", monkeypatch)
    assert report.phase == "quantized" and report.calls_observed == 2
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "x  " in line}
    assert list(rows) == ["eager", "torch.compile", "onlinequant"]
    assert float(rows["torch.compile"][2]) == 0
    assert 0 < float(rows["onlinequant"][2]) < 0.1
    assert max(map(len, text.splitlines()[:8])) <= 80 and "…" not in text
    assert Report.load(tmp_path / "out" / STATS_FILE).decisions == report.decisions
    assert (tmp_path / "out" / "layers.png").stat().st_size > 10_000
    assert str(tmp_path / "out" / STATS_FILE) in text


def test_the_unet_has_attention_on_every_level_but_the_last() -> None:
    unet = demo.build_unet((32, 64))
    names = [name for name, _ in unet.named_modules()]
    assert "down_blocks.0.attentions.0" in names and "down_blocks.1.attentions.0" not in names
    with torch.no_grad():
        assert unet(**demo._inputs(16, seed=0))[0].shape == (1, 4, 16, 16)


def test_the_model_and_its_inputs_are_the_same_every_time() -> None:
    first, second = (demo.build_unet((32,)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(demo._inputs(8, seed=3)["sample"], demo._inputs(8, seed=3)["sample"])
    assert not torch.equal(demo._inputs(8, seed=3)["sample"], demo._inputs(8, seed=4)["sample"])
