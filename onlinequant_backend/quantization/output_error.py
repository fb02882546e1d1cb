"""The error of a layer's 8-bit output."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..graph.layer_info import Sensitivity

# Output values compared at a time, at least one image: all of a video model's take more memory than its step.
_MOST = 2**26


def output_error(quantized: Callable[[slice], torch.Tensor], y: torch.Tensor) -> Sensitivity:
    """Compare a float output ``y`` with the 8-bit output, which ``quantized`` gives for a slice of its first
    dimension."""
    parts = max(min(len(y), math.ceil(y.numel() / _MOST)), 1)
    size = math.ceil(len(y) / parts)
    sums = []
    for start in range(0, len(y), size):
        part = slice(start, start + size)
        error = quantized(part).float() - y[part]
        sums.append(torch.stack([error.abs().sum(), error.square().sum(), y[part].abs().sum(dtype=torch.float32)]))
    mae, mse, magnitude = (torch.stack(sums).sum(0, dtype=torch.float64) / y.numel()).tolist()
    return Sensitivity(mae / max(magnitude, torch.finfo(torch.float32).tiny), mae, mse)
