"""8-bit linear and convolution on x86 CPUs through oneDNN.

oneDNN wants weights in a blocked layout of its own. They are packed once, and the graph is handed a *handle*: an
int8 tensor that has the weight's shape but one byte of memory, whose address finds the packed weight. So a compiled
graph has an ordinary tensor as its input, no second copy of the weight exists, and packing again (a LoRA) changes
nothing that the graph can see.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any

import torch

from ..graph.conv_geometry import ConvGeometry
from ..tensors import CHANNELS_LAST
from ..torch_internals import hardware
from .formats import NOT_FINITE
from .operands import Operands

_POINTWISE = ConvGeometry((1, 1), (0, 0), (1, 1))
_packed_weights: dict[int, torch.Tensor] = {}


@lru_cache(maxsize=1)
def has_vnni() -> bool:
    """Whether 8-bit products are summed in 32 bits; without, two of them are summed in 16 bits and saturate."""
    return hardware.int8_instructions() is not None


def new_handle(shape: torch.Size) -> torch.Tensor:
    """An int8 tensor of ``shape`` that stands for a packed weight."""
    handle = torch.zeros(1, dtype=torch.int8, device="cpu").expand(shape)
    weakref.finalize(handle, _packed_weights.pop, handle.data_ptr(), None)
    return handle


def pack(handle: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry | None = None) -> None:
    """Pack int8 ``weight`` ([N, K], or [O, C, *kernel] with the convolution's geometry) behind ``handle``."""
    packed = _pack_linear(weight) if geometry is None else _pack_conv(weight, geometry)
    _packed_weights[handle.data_ptr()] = packed


def linear(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    """See ``reference.linear``; ``weight`` may be a handle."""
    xq, qparams, weight, weight_scale, bias = operands
    packed = _packed_weights.get(weight.data_ptr())
    if packed is None:
        packed = _pack_linear(weight)
    _, zero_point, scale = qparams.tolist()
    rows = xq.reshape(-1, xq.shape[-1])
    b = None if bias is None else bias.float().contiguous()
    zeros = _zero_points(weight_scale.shape[0])
    if has_vnni():
        y = torch.ops.onednn.qlinear_pointwise(
            rows, scale, int(zero_point), packed, weight_scale, zeros, b, 1.0, 0, _fused_dtype(dtype), "none", [], ""
        )
    else:
        # A 1x1 convolution over a column of pixels: for that oneDNN has an AVX2 kernel, for linear only a loop.
        pixels = rows.view(1, -1, 1, rows.shape[1]).permute(0, 3, 1, 2)
        y = _qconv(pixels, scale, zero_point, packed, weight_scale, b, _POINTWISE, dtype)
        y = y.permute(0, 2, 3, 1).reshape(len(rows), -1)
    _mark_lost(y, rows)
    y = y.reshape(*xq.shape[:-1], weight_scale.shape[0])
    return y if y.dtype is dtype else y.to(dtype)


def conv(operands: Operands, geometry: ConvGeometry, dtype: torch.dtype) -> torch.Tensor:
    """See ``reference.conv``; ``weight`` may be a handle, the result is channels last."""
    xq, qparams, weight, weight_scale, bias = operands
    packed = _packed_weights.get(weight.data_ptr())
    if packed is None:
        packed = _pack_conv(weight, geometry)
    _, zero_point, scale = qparams.tolist()
    layout = CHANNELS_LAST[xq.dim()]
    b = None if bias is None else bias.float().contiguous()
    x = xq.contiguous(memory_format=layout)
    y = _qconv(x, scale, zero_point, packed, weight_scale, b, geometry, dtype)
    _mark_lost(y, x)
    return y.to(dtype).contiguous(memory_format=layout)


def _mark_lost(y: torch.Tensor, xq: torch.Tensor) -> None:
    """Have the rows, or images, of ``y`` whose ``xq`` holds what is not finite be NaN: oneDNN takes it for a number.

    That there is none is found at the speed of the memory, a few thousandths of the product's time.
    """
    lost = NOT_FINITE[xq.dtype]
    if xq.numel() and xq.amax() == lost:
        y[(xq == lost).flatten(1).any(1)] = torch.nan


def _qconv(
    x: torch.Tensor,
    scale: float,
    zero_point: float,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: ConvGeometry,
    dtype: torch.dtype,
) -> torch.Tensor:
    zeros = _zero_points(weight_scale.shape[0])
    # Of the output: its scale, zero point and dtype, and what is fused with it.
    output: tuple[Any, ...] = (1.0, 0, _fused_dtype(dtype), "none", [], "")
    return torch.ops.onednn.qconv_pointwise(
        x, scale, int(zero_point), packed, weight_scale, zeros, bias, *geometry, 1, *output
    )


def _pack_linear(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.contiguous()
    if has_vnni():
        return torch.ops.onednn.qlinear_prepack(weight, None)
    return _pack_conv(weight[:, :, None, None], _POINTWISE)


def _pack_conv(weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    # Scales and zero points are given anew at every call; here they only tell oneDNN that there will be some.
    scales = torch.ones(weight.shape[0], dtype=torch.float32, device="cpu")
    return torch.ops.onednn.qconv_prepack(weight.contiguous(), scales, 1.0, 128, *geometry, 1, None)


def _fused_dtype(dtype: torch.dtype) -> torch.dtype:
    # Without AVX-512, oneDNN writes anything but float32 with a reference loop, hundreds of times slower.
    return dtype if dtype is torch.bfloat16 and has_vnni() else torch.float32


@lru_cache(maxsize=256)
def _zero_points(channels: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(channels, dtype=torch.int64, device="cpu")
