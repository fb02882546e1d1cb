"""The ops on a CPU: products by oneDNN or emulated, and what is fused elsewhere as one step after another.

A CPU gains nothing by fusing these; the emulated formats let any machine run the graphs that a GPU gets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..graph.conv_geometry import ConvGeometry
from . import emulated, x86
from .operands import Operands


def linear(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    """See ``reference.linear``; ``weight`` may be a handle."""
    return (x86 if operands.xq.dtype is torch.uint8 else emulated).linear(operands, dtype)


def conv(
    operands: Operands,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    channel_add: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``reference.conv``; ``weight`` may be a handle, the result is channels last."""
    y = (x86 if operands.xq.dtype is torch.uint8 else emulated).conv(operands, geometry, dtype)
    if channel_add is not None:
        y = y + channel_add.view(*channel_add.shape, *[1] * (y.dim() - 2))
    if residual is not None:
        y = y + residual
    return y if y.dtype is dtype else y.to(dtype)


def geglu(operands: Operands, out_qparams: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """See ``reference.geglu``."""
    value, gate = linear(operands, torch.float32).chunk(2, dim=-1)
    y = value * F.gelu(gate)
    return y.to(dtype) if out_qparams is None else torch.ops.onlinequant.quantize(y, out_qparams, dtype, False)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, format: str) -> torch.Tensor:
    """See ``emulated.attention``."""
    return emulated.attention(q, k, v, scale, format)


def layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    qparams: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``nvidia.operators.layer_norm``."""
    total = x if residual is None else x + residual
    y = F.layer_norm(total.float(), x.shape[-1:], _float(weight), _float(bias), eps)
    xq = torch.ops.onlinequant.quantize(y, qparams, dtype, False)
    return x.new_empty(0) if residual is None else total, xq


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    qparams: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ``nvidia.operators.group_norm``."""
    y = F.group_norm(x.float(), groups, _float(weight), _float(bias), eps)
    if silu:
        y = F.silu(y)
    return torch.ops.onlinequant.quantize(y, qparams, dtype, True)


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()
