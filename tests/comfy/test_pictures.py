"""What the Compare and Report nodes show, without ComfyUI."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onlinequant_backend import Report
from onlinequant_backend.comfy_integration import record, summary
from onlinequant_backend.comfy_integration.pictures import AMPLIFIED, compare
from onlinequant_backend.comfy_integration.record import Pace, Record
from onlinequant_backend.runtime import SamplingRun
from tests.helpers.reports import made


def image(*size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0)) * 0.8


def test_images_lie_side_by_side_with_their_difference() -> None:
    reference = image(2, 16, 20, 3)
    comparison = compare(reference + 0.1, reference)
    assert comparison.psnr == pytest.approx(20, abs=1e-3) and str(comparison).startswith("PSNR 20.0 dB, SSIM 0.9")
    left, middle, right = comparison.side_by_side.split(20, dim=2)
    torch.testing.assert_close(left, reference)
    torch.testing.assert_close(middle, reference + 0.1)
    torch.testing.assert_close(right, torch.full_like(reference, 0.1 * AMPLIFIED))


def test_equal_pictures_are_called_equal() -> None:
    assert str(compare(image(1, 16, 16, 3), image(1, 16, 16, 3))) == "equal"


@pytest.mark.parametrize("size", [(2, 4, 16, 20), (1, 16, 3, 16, 20)])
def test_latents_have_a_range_of_their_own(size: tuple[int, ...]) -> None:
    reference = {"samples": image(*size) * 10 - 5}
    picture = {"samples": reference["samples"] + 0.8}  # a tenth of the range
    comparison = compare(picture, reference)
    assert comparison.psnr == pytest.approx(20, abs=0.05)
    pictures = size[0] * math.prod(size[2:-2])
    assert comparison.side_by_side.shape == (pictures, 16, 3 * 20, 3)
    assert comparison.side_by_side.min() >= 0 and comparison.side_by_side.max() <= 1


@pytest.mark.parametrize(
    ("picture", "reference", "message"),
    [
        (image(1, 8, 8, 3), image(1, 8, 16, 3), "1 of 8 x 8 with 3 channels and 1 of 16 x 8 with 3"),
        ({"samples": image(1, 4, 8, 8)}, image(1, 8, 8, 3), "decode the latent"),
    ],
)
def test_what_cannot_be_compared_is_refused(picture: Any, reference: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(picture, reference)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time goes on when a test says so."""
    result = SimpleNamespace(now=0.0)
    monkeypatch.setattr(record, "time", SimpleNamespace(perf_counter=lambda: result.now))
    return result


def sample(
    seen: Record, clock: SimpleNamespace, report: Report, phase: str, seconds: float, steps: int = 3, size: int = 8
) -> None:
    """A run in a phase, each step of two calls and so many seconds."""
    run, report.phase = SamplingRun(steps), phase
    for run.step in range(1, steps + 1):
        for _ in range(2):
            with seen.call(run, size):
                run.called.append((report, phase))
            clock.now += seconds / 2


@pytest.fixture
def seen(clock: SimpleNamespace) -> Record:
    """Of a model that was observed and then in 8 bit."""
    result, report = Record(), made()
    sample(result, clock, report, "calibrating", 2.0, steps=6)
    sample(result, clock, report, "quantized", 1.0, steps=6)
    return result


def test_the_table_tells_speed_difference_and_every_layer(seen: Record) -> None:
    text = summary.table(seen.snapshot(), "PSNR 31.0 dB, SSIM 0.9900")
    first, second, *_ = text.splitlines()
    assert first == "a step in float, observed: 2000 ms, 4 steps; in 8 bit: 1000 ms, 5 steps; 2x"
    assert second == "difference from the float image: PSNR 31.0 dB, SSIM 0.9900"
    assert made().table() in text
    seen.reports[0].stats_path = "a path of the server's"
    assert "path" not in summary.table(seen.snapshot(), None)
    assert summary.headline(seen.snapshot(), "equal") == f"{seen.reports[0].summary()} · {first} · equal"
    assert seen.summaries() == [seen.reports[0].summary(), "2x"]


def test_a_step_or_two_are_no_base_for_what_is_gained(clock: SimpleNamespace) -> None:
    seen, report = Record(), made()
    sample(seen, clock, report, "calibrating", 30.0)
    sample(seen, clock, report, "quantized", 1.0, steps=6)
    assert summary.speed(seen.snapshot()) == "a step in float, observed: 30000 ms, 1 step; in 8 bit: 1000 ms, 5 steps"
    sample(seen, clock, report, "float", 2.0, steps=5)
    assert seen.snapshot().gain == 2


def test_before_any_sampling_there_is_little_to_tell() -> None:
    nothing = Record().snapshot()
    assert summary.table(nothing, None).startswith("a step was not timed yet")
    assert summary.chart(nothing).size == (1300, 715)


def test_float_steps_while_it_compiles_count_and_the_gain_is_over_the_fastest(
    seen: Record, clock: SimpleNamespace
) -> None:
    (report,) = seen.reports
    for phase in ("compiling", "float"):
        sample(seen, clock, report, phase, 1.5)
    snapshot = seen.snapshot()
    assert snapshot.paces["float"] == Pace(1500.0, 4) and snapshot.gain == 1.5  # two runs of three steps


def test_a_step_that_compiled_is_not_timed(clock: SimpleNamespace) -> None:
    seen, report, run = Record(), made(), SamplingRun(4)
    seen.reports.append(report)
    for run.step, before in enumerate(("calibrating", "quantized", "quantized", "quantized"), 1):
        with seen.call(run):
            run.called = [(report, before)]
            report.phase = "quantized"
        clock.now += 1
    assert seen.snapshot().paces == {"quantized": Pace(1000.0, 2)}


def test_a_step_that_traced_is_not_timed(clock: SimpleNamespace) -> None:
    seen, report = Record(), made()
    sample(seen, clock, report, "calibrating", 60.0, steps=2)
    assert not seen.snapshot().paces
    sample(seen, clock, report, "calibrating", 2.0, steps=2)
    assert seen.snapshot().paces == {"calibrating": Pace(2000.0, 1)}


def test_steps_of_different_runs_and_skipped_ones_are_not_timed(clock: SimpleNamespace) -> None:
    seen, report = Record(), made()
    seen.reports.append(report)
    for steps in ((1,), (2, 4)):
        run = SamplingRun(4)
        for run.step in steps:
            with seen.call(run):
                run.called = [(report, report.phase)]
            clock.now += 1
    assert not seen.snapshot().paces


def test_another_size_has_times_of_its_own(seen: Record, clock: SimpleNamespace) -> None:
    sample(seen, clock, seen.reports[0], "quantized", 4.0, size=16)
    assert seen.snapshot().paces == {"quantized": Pace(4000.0, 2)} and seen.snapshot().gain is None


def test_a_pattern_that_excludes_nothing_in_any_graph_is_said(seen: Record, clock: SimpleNamespace) -> None:
    (report,) = seen.reports
    report.config = {"exclude": ["to_k", "down_*", "nowhere", "*.other"]}
    assert "exclude: no layer is called 'nowhere'" in seen.summaries()
    assert "'nowhere', '*.other': no layer has such a name" in summary.table(seen.snapshot(), None)
    decisions = [dataclasses.replace(report.decisions[0], name="a.other")]
    sample(seen, clock, dataclasses.replace(report, decisions=decisions), "quantized", 1.0)
    assert seen.snapshot().warnings() == ["exclude: no layer is called 'nowhere'"]


@pytest.mark.parametrize(("error", "is_said"), [(None, False), (0.1, False), (0.55, True)])
def test_an_error_that_shows_in_the_picture_is_said(error: float | None, is_said: bool, seen: Record) -> None:
    (report,) = seen.reports
    report.error = error
    warning = "a step in 8 bit differs by 0.55 from float"
    snapshot = seen.snapshot()
    for text in (summary.table(snapshot, None), summary.headline(snapshot), "\n".join(seen.summaries())):
        assert (warning in text) == is_said


def test_a_snapshot_stays_as_it_was(seen: Record) -> None:
    snapshot = seen.snapshot()
    before = summary.table(snapshot, None), summary.headline(snapshot)
    (report,) = seen.reports
    report.phase, report.phase_reason = "compiling", "another size"
    report.decisions.clear()
    assert (summary.table(snapshot, None), summary.headline(snapshot)) == before


def test_the_chart_shows_speeds_and_layers(seen: Record, tmp_path: Path) -> None:
    empty, full = (summary.as_image(summary.chart(each.snapshot())) for each in (Record(), seen))
    assert full.shape == (1, 715, 1300, 3) and full.dtype == torch.float32
    assert full.min() >= 0 and full.max() <= 1
    for part in (slice(0, 325), slice(325, 1300)):
        assert (empty[..., part, :] != full[..., part, :]).any()
    name = summary.save(summary.chart(seen.snapshot()), tmp_path)
    saved = np.asarray(Image.open(tmp_path / name).convert("RGB"), np.float32) / 255
    assert np.abs(saved - full[0].numpy()).mean() < 0.01


def test_what_has_not_changed_is_neither_drawn_nor_written_again(
    seen: Record, clock: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[object] = []
    monkeypatch.setattr(summary, "draw_layers", lambda figure, report: drawn.append(report))
    names = []
    for _ in range(2):
        summary._layers.cache_clear()
        names.append(summary.save(summary.chart(seen.snapshot()), tmp_path))
    written = (tmp_path / names[0]).stat().st_mtime_ns
    sample(seen, clock, seen.reports[0], "quantized", 1.5)
    names.append(summary.save(summary.chart(seen.snapshot()), tmp_path))
    assert len(drawn) == 2 and names[0] == names[1] != names[2]
    assert (tmp_path / names[0]).stat().st_mtime_ns == written
    seen.reports[0].decisions = [dataclasses.replace(each, density=1.0) for each in seen.reports[0].decisions]
    summary.chart(seen.snapshot())
    assert len(drawn) == 3
