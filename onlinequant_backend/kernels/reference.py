"""What every kernel must compute, in plain torch and float64: the oracle that the tests compare against.

An activation is stored as unsigned integers (or, with zero point 0, signed ones or 8-bit floats) q with
x = (q - zero_point) * scale, a weight as signed integers (or 8-bit floats) w_q with w = w_q * weight_scale, one scale
for each output channel, for a block of its values or for all (Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", 2017, section 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..graph.conv_geometry import ConvGeometry
from .formats import NOT_FINITE
from .operands import Operands


def dequantize(xq: torch.Tensor, qparams: torch.Tensor) -> torch.Tensor:
    """Turn 8-bit ``xq`` of any shape back into float64; ``qparams`` is as in ``ops.quantize``. Of int8, what was not
    finite is a number to GPUs' kernels."""
    _, zero_point, scale = qparams.double()
    return (xq.double().masked_fill(xq.float() == NOT_FINITE[xq.dtype], torch.nan) - zero_point) * scale


def dequantize_weight(weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Turn an 8-bit weight [N, ...] back into float64; its scales are [1], [N], or [N, blocks]."""
    blocks = weight_scale.shape[1] if weight_scale.dim() == 2 else 1
    values = weight.double().reshape(weight.shape[0], blocks, -1)
    return (values * weight_scale.double().view(-1, blocks, 1)).reshape(weight.shape)


def linear(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    """``xq`` 8 bit [..., K], ``weight`` 8 bit [N, K]; returns ``dtype`` [..., N]."""
    return F.linear(*_in_float(operands)).to(dtype)


def conv(operands: Operands, geometry: ConvGeometry, dtype: torch.dtype) -> torch.Tensor:
    """``xq`` 8 bit [N, C, *spatial], ``weight`` 8 bit [O, C, *kernel] with two or three spatial dimensions."""
    convolve = F.conv2d if operands.weight.dim() == 4 else F.conv3d
    return convolve(*_in_float(operands), *geometry).to(dtype)


def geglu(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    """``linear`` whose first half of columns is multiplied by GELU of the second; ``weight`` [2 N, K]."""
    value, gate = linear(operands, torch.float64).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(dtype)


def group_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, silu: bool
) -> torch.Tensor:
    """GroupNorm of ``x`` [N, C, *spatial], and SiLU of that if asked for, in float64: not quantized yet."""
    y = F.group_norm(
        x.double(), groups, None if weight is None else weight.double(), None if bias is None else bias.double(), eps
    )
    return F.silu(y) if silu else y


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(``scale`` * q k^T) v in float64; ``q`` [batch, heads, queries, size], ``k`` and ``v`` [batch, heads,
    tokens, size]. Without tokens it is 0."""
    return torch.softmax(scale * (q.double() @ k.double().mT), -1) @ v.double()


def _in_float(operands: Operands) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    xq, qparams, weight, weight_scale, bias = operands
    x, w = dequantize(xq, qparams), dequantize_weight(weight, weight_scale)
    return x, w, None if bias is None else bias.double()
