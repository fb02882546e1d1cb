"""Symmetric 8-bit formats where there are no instructions for them: exact products, summed in float32.

As slow as float. It shows on any machine what such a format does to a picture, and lets rewritten graphs be tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..tensors import CHANNELS_LAST
from .formats import NOT_FINITE


def linear(
    xq: torch.Tensor,
    qparams: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ``reference.linear``."""
    y = F.linear(_float(xq), weight.float()) * (qparams[2] * weight_scale)
    return (y if bias is None else y + bias.float()).to(dtype)


def conv(
    xq: torch.Tensor,
    qparams: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ``reference.conv``; the result is channels last."""
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d
    per_channel = (-1, *[1] * (weight.dim() - 2))
    y = convolve(_float(xq), weight.float(), None, list(stride), list(padding), list(dilation))
    y = y * (qparams[2] * weight_scale).view(per_channel)
    if bias is not None:
        y = y + bias.float().view(per_channel)
    layout = CHANNELS_LAST[xq.dim()]
    return y.to(dtype).contiguous(memory_format=layout)


def _float(xq: torch.Tensor) -> torch.Tensor:
    x = xq.float()
    return x if xq.dtype.is_floating_point else x.masked_fill(x == NOT_FINITE[xq.dtype], torch.nan)
