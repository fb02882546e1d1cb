"""Symmetric 8-bit formats where there are no instructions for them: exact products, summed in float32.

As slow as float. It shows on any machine what such a format does to a picture, and lets rewritten graphs be tested.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..graph.conv_geometry import ConvGeometry
from ..tensors import CHANNELS_LAST
from .formats import NOT_FINITE
from .operands import Operands


def linear(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    """See ``reference.linear``."""
    xq, qparams, weight, weight_scale, bias = operands
    y = F.linear(_float(xq), weight.float()) * (qparams[2] * weight_scale)
    return (y if bias is None else y + bias.float()).to(dtype)


def conv(operands: Operands, geometry: ConvGeometry, dtype: torch.dtype) -> torch.Tensor:
    """See ``reference.conv``; the result is channels last."""
    xq, qparams, weight, weight_scale, bias = operands
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d
    per_channel = (-1, *[1] * (weight.dim() - 2))
    y = convolve(_float(xq), weight.float(), None, *geometry)
    y = y * (qparams[2] * weight_scale).view(per_channel)
    if bias is not None:
        y = y + bias.float().view(per_channel)
    return y.to(dtype).contiguous(memory_format=CHANNELS_LAST[xq.dim()])


def _float(xq: torch.Tensor) -> torch.Tensor:
    x = xq.float()
    return x if xq.dtype.is_floating_point else x.masked_fill(x == NOT_FINITE[xq.dtype], torch.nan)
