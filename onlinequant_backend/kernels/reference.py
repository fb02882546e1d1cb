"""What every kernel must compute, in plain torch and float64: the oracle that the tests compare against.

An activation is stored as unsigned integers (or, with zero point 0, signed ones or 8-bit floats) q with
x = (q - zero_point) * scale, a weight as signed integers (or 8-bit floats) w_q with w = w_q * weight_scale, one scale
for each output channel or for all (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2017, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .formats import NOT_FINITE


def dequantize(xq: torch.Tensor, qparams: torch.Tensor) -> torch.Tensor:
    """Turn 8-bit ``xq`` of any shape back into float64; ``qparams`` is as in ``ops.quantize``. Of int8, what was not
    finite is a number to GPUs' kernels."""
    _, zero_point, scale = qparams.double()
    return (xq.double().masked_fill(xq.float() == NOT_FINITE[xq.dtype], torch.nan) - zero_point) * scale


def linear(
    xq: torch.Tensor,
    qparams: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``xq`` uint8 [..., K], ``weight`` int8 [N, K], ``weight_scale`` float32 [N]; returns ``dtype`` [..., N]."""
    w = weight.double() * weight_scale.double()[:, None]
    return F.linear(dequantize(xq, qparams), w, None if bias is None else bias.double()).to(dtype)


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
    """``xq`` uint8 [N, C, *spatial], ``weight`` int8 [O, C, *kernel] with two or three spatial dimensions."""
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d
    w = weight.double() * weight_scale.double().view(-1, *[1] * (weight.dim() - 1))
    b = None if bias is None else bias.double()
    return convolve(dequantize(xq, qparams), w, b, list(stride), list(padding), list(dilation)).to(dtype)


def geglu(
    xq: torch.Tensor,
    qparams: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``linear`` whose first half of columns is multiplied by GELU of the second; ``weight`` [2 N, K]."""
    value, gate = linear(xq, qparams, weight, weight_scale, bias, torch.float64).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(dtype)


def group_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, silu: bool
) -> torch.Tensor:
    """GroupNorm of ``x`` [N, C, *spatial], and SiLU of that if asked for, in float64: not quantized yet."""
    y = F.group_norm(
        x.double(), groups, None if weight is None else weight.double(), None if bias is None else bias.double(), eps
    )
    return F.silu(y) if silu else y
