"""Compares an image or latent with a reference: PSNR, SSIM and an image of the difference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from onlinequant_backend.report.image_quality import psnr, ssim

# Without amplification, differences of a good quantized image are not visible.
AMPLIFIED = 5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """PSNR in dB and SSIM of an image, and [N, H, 3 W, 3] in [0, 1]: reference, image and amplified difference."""

    psnr: float
    ssim: float
    side_by_side: torch.Tensor

    def __str__(self) -> str:
        return "equal" if self.psnr == math.inf else f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}"


def compare(picture: Any, reference: Any) -> Comparison:
    """Compare two IMAGEs, [N, H, W, C] in [0, 1], or two LATENTs, {"samples": [N, C, ..., H, W]}, whose range is taken
    from the reference. Raises ValueError if they differ in kind or size.
    """
    if isinstance(picture, dict) != isinstance(reference, dict):
        raise ValueError("A latent cannot be compared with an image: decode the latent, or connect two of one kind.")
    x, y = _channels_first(picture), _channels_first(reference)
    if x.shape != y.shape:
        sizes = " and ".join(
            f"{len(each)} of {each.shape[3]} x {each.shape[2]} with {each.shape[1]} channels" for each in (x, y)
        )
        raise ValueError(f"Images differ in number or size, {sizes}: sample both with the same settings.")
    low, high = (y.min(), y.max()) if isinstance(reference, dict) else (y.new_zeros(()), y.new_ones(()))
    peak = max(float(high - low), 1e-12)
    shown, expected = (_rgb((tensor - low) / peak) for tensor in (x, y))
    difference = ((shown - expected).abs() * AMPLIFIED).clamp(max=1)
    panels = torch.cat([expected, shown, difference], dim=-1).movedim(1, -1)
    return Comparison(psnr(x, y, peak), ssim(x, y, peak), panels)


def _channels_first(picture: Any) -> torch.Tensor:
    """[N, C, H, W] on the CPU; the frames of a video latent count as images."""
    if not isinstance(picture, dict):
        return picture.detach().float().cpu().movedim(-1, 1)
    samples = picture["samples"].detach().float().cpu()
    return samples.movedim(1, -3).flatten(0, -4)


def _rgb(values: torch.Tensor) -> torch.Tensor:
    """Three of the channels, in [0, 1]."""
    three = values[:, :3] if values.shape[1] >= 3 else values[:, :1].expand(-1, 3, -1, -1)
    return three.clamp(0, 1)
