from __future__ import annotations

import math

import pytest
import torch

from onlinequant_backend.report.image_quality import psnr, ssim


def picture(*size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0))


def test_equal_pictures() -> None:
    x = picture(2, 3, 20, 30)
    assert psnr(x, x, 1.0) == math.inf and ssim(x, x, 1.0) == pytest.approx(1)


@pytest.mark.parametrize(("error", "peak", "expected"), [(0.1, 1.0, 20), (0.01, 1.0, 40), (0.01, 10.0, 60)])
def test_psnr_is_of_the_mean_squared_error(error: float, peak: float, expected: float) -> None:
    x = picture(1, 3, 8, 8)
    assert psnr(x + error, x, peak) == pytest.approx(expected, abs=1e-3)


def test_ssim_of_a_constant_shift_is_that_of_the_means() -> None:
    # Without variance the formula is (2 a b + c1) / (a^2 + b^2 + c1).
    a, b, c1 = 0.4, 0.6, 0.01**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b), 1.0) == pytest.approx(expected)


def test_ssim_of_one_window_is_the_formula() -> None:
    x, y = picture(1, 1, 11, 11).double(), picture(2, 1, 11, 11)[1:].double()
    g = torch.exp(-((torch.arange(11).double() - 5) ** 2) / 4.5)
    w = torch.outer(g, g) / g.sum() ** 2

    def mean(values: torch.Tensor) -> float:
        return float((w * values[0, 0]).sum())

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 1e-4, 9e-4
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(x, y, 1.0) == pytest.approx(expected, rel=1e-6)


def test_a_structure_that_is_lost_counts_more_than_one_that_is_shifted() -> None:
    x = picture(1, 3, 32, 32)
    blurred = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    assert ssim(blurred, x, 1.0) < 0.5 < ssim(x + 0.05, x, 1.0)


def test_pictures_smaller_than_the_window() -> None:
    assert 0 < ssim(picture(1, 3, 4, 7) * 0.9, picture(1, 3, 4, 7), 1.0) < 1


def test_other_sizes_are_refused() -> None:
    for function in (psnr, ssim):
        with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\) and \(1, 3, 8, 9\)"):
            function(picture(1, 3, 8, 8), picture(1, 3, 8, 9), 1.0)
