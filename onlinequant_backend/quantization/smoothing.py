"""Smoothing: channels far larger than the others would take up most of an 8-bit range, so they are scaled down before
they are quantized, and the weights that read them are scaled up.

Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models", 2023, with
migration strength 1/2. Factors are powers of two, so that they round neither activations nor weights.
"""

from __future__ import annotations

import torch

from ..cache.calibration_checks import LEAST_FACTOR

# A channel is an outlier if its largest magnitude exceeds that of the median channel by this factor.
OUTLIER = 8.0


def smoothing_factors(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """The factor, at most 1, for each channel of a layer's input; None if no channel is an outlier.

    ``weight``: float [N, C] or [O, C, *kernel]. ``x``: float [..., C] or [N, C, ...]. Returns float32 that broadcasts
    with both ``x`` and ``weight``, [C] or [1, C, 1, ...].
    """
    shape = [1, -1, *[1] * (weight.dim() - 2)] if weight.dim() > 2 else [-1]
    largest, largest_weight = (_largest(tensor, channel) for tensor, channel in ((x, len(shape) > 1), (weight, True)))
    typical, typical_weight = largest.median(), largest_weight.median()
    stands_out = largest > OUTLIER * typical
    if not (stands_out.any() and torch.isfinite(largest).all() and torch.isfinite(largest_weight).all()):
        return None
    if not (typical > 0 and typical_weight > 0):
        return None
    # Equation 4, relative to the median channel, which is not changed.
    balanced = (largest_weight.clamp(min=typical_weight / 2**10) / typical_weight * typical / largest).sqrt()
    factors = torch.where(stands_out, torch.exp2(balanced.log2().round()).clamp(LEAST_FACTOR, 1), 1.0)
    return factors.view(shape)


def _largest(tensor: torch.Tensor, is_second: bool) -> torch.Tensor:
    """The largest magnitude in each channel; channels are the second dimension or the last; float32 [C]."""
    channel = 1 if is_second else tensor.dim() - 1
    others = [dim for dim in range(tensor.dim()) if dim != channel]
    if tensor.dtype.itemsize == 1:  # float8, which has no amax
        tensor = tensor.float()
    return torch.maximum(tensor.amax(others), -tensor.amin(others)).float()
