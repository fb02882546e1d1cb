"""Symmetric 8-bit formats where there are no instructions for them: exact products, summed in float32.

As slow as float. It shows on any machine what such a format does to a picture, and lets rewritten graphs be tested.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..graph.conv_geometry import ConvGeometry
from ..tensors import CHANNELS_LAST
from . import reference
from .formats import FLOAT, LIMITS, NOT_FINITE, attention_dtype
from .operands import Operands

_TOKENS = 128  # of which keys and values have one scale


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


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, format: str) -> torch.Tensor:
    """See ``reference.attention``; rounded where ``nvidia.attention`` rounds."""
    if format == FLOAT:
        return _by_token(reference.attention(q, k, v, scale), q.dtype)
    dtype, size = attention_dtype(format), q.shape[-1]
    keys = k.float() - k.float().mean(2, keepdim=True)
    s = _rounded(q.float() * scale, dtype, (1, size)) @ _rounded(keys, dtype, (_TOKENS, size)).mT
    weights, values = torch.softmax(s, -1), v.float()
    if dtype.is_floating_point:
        weights = _rounded(weights, dtype, (1, max(k.shape[2], 1)))
        values = _rounded(values, dtype, (_TOKENS, size))
    return _by_token(weights @ values, q.dtype)


def _by_token(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Laid out as [batch, queries, heads, size]."""
    return y.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)


def _rounded(x: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]) -> torch.Tensor:
    """``x`` [..., rows, columns] as ``dtype`` holds it, with a scale for each ``block`` of rows and columns."""
    rows, columns = x.shape[-2:]
    blocks = F.pad(x, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = blocks.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    scale = blocks.abs().amax((-3, -1), keepdim=True).clamp(min=1e-12) / LIMITS[dtype][1]
    q = blocks / scale
    q = q.to(dtype).float() if dtype.is_floating_point else q.round()
    return (q * scale).flatten(-4, -3).flatten(-2)[..., :rows, :columns]


def _float(xq: torch.Tensor) -> torch.Tensor:
    x = xq.float()
    return x if xq.dtype.is_floating_point else x.masked_fill(x == NOT_FINITE[xq.dtype], torch.nan)
