"""How alike two pictures are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def psnr(picture: torch.Tensor, reference: torch.Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB, ``10 log10(peak**2 / mean squared difference)``; infinite for equal tensors.

    Tensors of one shape; ``peak``: the largest value that there can be, less the smallest.
    """
    x, y = _checked(picture, reference)
    error = (x - y).square().mean().item()
    return 10 * math.log10(peak**2 / error) if error > 0 else math.inf


def ssim(picture: torch.Tensor, reference: torch.Tensor, peak: float) -> float:
    """Mean structural similarity, at most 1, of [N, C, H, W]; each channel by itself.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004: a Gaussian window of
    11 x 11 with a deviation of 1.5, K1 = 0.01, K2 = 0.03. Pictures smaller than the window get one of their own size.
    """
    x, y = (tensor.flatten(0, 1)[:, None] for tensor in _checked(picture, reference))
    window = _gaussian(min(11, x.shape[2]))[:, None] * _gaussian(min(11, x.shape[3]))[None, :]

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, window[None, None])

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean().item()


def _checked(picture: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if picture.shape != reference.shape:
        raise ValueError(f"pictures of {tuple(picture.shape)} and {tuple(reference.shape)} cannot be compared")
    return picture.detach().cpu().double(), reference.detach().cpu().double()


def _gaussian(size: int) -> torch.Tensor:
    places = torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2
    weights = torch.exp(-(places**2) / (2 * 1.5**2))
    return weights / weights.sum()
