from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from onlinequant_backend.cache.calibration_file import STATS_FILE
from onlinequant_backend.cli import demo
from onlinequant_backend.report.report import Report
from onlinequant_backend.scenes.model import ScenesModel, load
from tests.helpers.tiny import Block


class Denoiser(torch.nn.Module):
    """Called as diffusers' UNets are, and compiled in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(50, 16, 3, padding=1)
        self.block = Block()
        self.conv_out = torch.nn.Conv2d(16, 48, 1)

    def forward(self, sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (self.conv_out(self.block(self.conv_in(sample))),)


def small() -> ScenesModel:
    model = load()
    torch.manual_seed(0)
    model.unet = Denoiser().eval().requires_grad_(False)
    return model


def ran(output: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Report]:
    """What the demo prints for a small model, and its report; what stands in for torch.compile compiles nothing."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, backend="eager", **more: compile_(model, backend=backend, **more)
    )
    monkeypatch.setattr(demo, "load", small)
    text = io.StringIO()
    report = demo.run(output, pictures=3, steps=2, rounds=2, console=Console(file=text, width=80))
    return text.getvalue(), report


def test_the_demo_draws_compares_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, report = ran(tmp_path / "out", monkeypatch)
    # One whole run was observed, of other pictures; the demo's own were drawn in 8 bit.
    assert report.phase == "quantized" and report.calls_observed == 2
    rows = {line[:36].strip(): line[36:].split() for line in text.splitlines()}
    assert rows["PSNR to eager, worst picture"][:2] == ["equal", "equal"]
    assert 20 < float(rows["PSNR to eager, worst picture"][2]) <= float(rows["PSNR to eager, mean of the pictures"][2])
    assert rows["SSIM to eager"][:2] == ["1.0000", "1.0000"] and 0.5 < float(rows["SSIM to eager"][2]) < 1
    assert rows["speed-up over torch.compile"][1] == "1.00x"
    assert rows["captions drawn right"] == ["0", "of", "3"] * 3
    counts = report.counts()
    assert rows["convolutions in 8 bit"] == [str(counts["quantized_conv"]), "of", "3"]
    assert counts["quantized_conv"] > 0
    assert max(map(len, text.splitlines()[:12])) <= 80 and "…" not in text
    assert Report.load(tmp_path / "out" / STATS_FILE).decisions == report.decisions
    for name in ("layers.png", "sheet.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000 and str(tmp_path / "out" / name) in text


def test_it_says_so_where_nothing_ran_in_8_bit() -> None:
    text = io.StringIO()
    demo._print_notes(Console(file=text), [], Report("UNet", phase="float", phase_reason="no layer qualifies"))
    assert "Nothing ran in 8 bit: no layer qualifies" in text.getvalue()


def test_it_says_so_where_8_bit_is_not_faster() -> None:
    text = io.StringIO()
    contestants = [
        demo.Contestant(name, print, 1, torch.zeros(0), [seconds])
        for name, seconds in (("eager", 3), ("torch.compile", 2), ("onlinequant", 2))
    ]
    demo._print_notes(Console(file=text), contestants, Report("UNet", phase="quantized"))
    assert "8 bit is not faster here" in text.getvalue()
    contestants[2].seconds = [1]
    demo._print_notes(Console(file=text), contestants, Report("UNet", phase="quantized"))
    assert text.getvalue().count("8 bit is not faster here") == 1
