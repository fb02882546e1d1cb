"""What the Compare and Report nodes show, without ComfyUI."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from onlinequant_backend.comfy_integration import summary
from onlinequant_backend.comfy_integration.pictures import AMPLIFIED, compare
from onlinequant_backend.comfy_integration.record import Record
from onlinequant_backend.sampling import SamplingRun
from tests.test_report import made


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
        (image(1, 8, 8, 3), image(1, 8, 16, 3), "1x3x8x8 and 1x3x8x16"),
        ({"samples": image(1, 4, 8, 8)}, image(1, 8, 8, 3), "decode the latent"),
    ],
)
def test_what_cannot_be_compared_is_refused(picture: Any, reference: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(picture, reference)


def record(phases: dict[str, float]) -> Record:
    """Of a model that had been called in these phases, each call so many seconds long."""
    result, report, run = Record(), made(), SamplingRun(3)
    for phase, seconds in phases.items():
        report.phase = phase
        for _ in range(2):
            run.called = [(report, phase)]
            with result.call(run):
                pass
            assert result._last is not None
            result._last = (run, result._last[1] - seconds, result._last[2])
        result._last = None
    return result


def test_the_table_tells_speed_difference_and_every_layer() -> None:
    seen = record({"calibrating": 2.0, "quantized": 1.0})
    text = summary.table(seen, "PSNR 31.0 dB, SSIM 0.9900")
    first, second, *_ = text.splitlines()
    assert first == "a call of the model: 2000 ms in float, observed and 1000 ms in 8 bit"
    assert second == "the picture against float's: PSNR 31.0 dB, SSIM 0.9900"
    assert made().table() in text
    seen.reports[0].stats_path = "a path of the server's"
    assert "path" not in summary.table(seen, None)
    assert summary.headline(seen, "equal") == f"{seen.reports[0].summary()} · {first} · equal"


def test_before_any_sampling_there_is_little_to_tell() -> None:
    assert summary.table(Record(), None).startswith("a call of the model: not timed yet")
    assert summary.chart(Record()).shape == (1, 715, 1300, 3)


def test_a_call_that_compiled_is_not_timed() -> None:
    result, report, run = Record(), made(), SamplingRun(3)
    for before in ("calibrating", "quantized", "quantized"):
        with result.call(run):
            run.called = [(report, before)]
            report.phase = "quantized"
    assert list(result.milliseconds()) == ["quantized"]
    assert len(result._seconds["quantized"]) == 1


def test_calls_of_different_runs_are_not_timed_together() -> None:
    result, report = Record(), made()
    for _ in range(2):
        run = SamplingRun(1)
        with result.call(run):
            run.called = [(report, report.phase)]
    assert not result.milliseconds()


def test_the_chart_shows_speeds_and_layers() -> None:
    empty, full = summary.chart(Record()), summary.chart(record({"calibrating": 2.0, "quantized": 1.0}))
    assert full.shape == (1, 715, 1300, 3) and full.dtype == torch.float32
    assert full.min() >= 0 and full.max() <= 1
    for part in (slice(0, 325), slice(325, 1300)):
        assert (empty[..., part, :] != full[..., part, :]).any()
