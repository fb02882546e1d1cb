"""8-bit linear and convolution on x86 CPUs through oneDNN.

oneDNN wants weights in a blocked layout of its own. They are packed once, and the graph is handed a *handle*: an
int8 tensor that has the weight's shape but one byte of memory, whose address finds the packed weight. So a compiled
graph has an ordinary tensor as its input, no second copy of the weight exists, and packing again (a LoRA) changes
nothing that the graph can see.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache

import torch

from ..tensors import CHANNELS_LAST
from ..torch_internals import hardware
from . import emulated
from .formats import NOT_FINITE

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


def pack(
    handle: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
) -> None:
    """Pack int8 ``weight`` ([N, K], or [O, C, *kernel] with the convolution's geometry) behind ``handle``."""
    if weight.dim() == 2:
        packed = _pack_linear(weight)
    else:
        packed = _pack_conv(weight, stride, padding, dilation)
    _packed_weights[handle.data_ptr()] = packed


def linear(
    xq: torch.Tensor,
    qparams: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ``reference.linear``; ``weight`` may be a handle."""
    if xq.dtype is not torch.uint8:
        return emulated.linear(xq, qparams, weight, weight_scale, bias, dtype)
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
        y = _qconv(pixels, scale, zero_point, packed, weight_scale, b, (1, 1), (0, 0), (1, 1), dtype)
        y = y.permute(0, 2, 3, 1).reshape(len(rows), -1)
    _mark_lost(y, rows)
    return y.reshape(*xq.shape[:-1], weight_scale.shape[0]).to(dtype)


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
    residual: torch.Tensor | None = None,
    channel_add: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``reference.conv``; ``weight`` may be a handle, the result is channels last."""
    y = _conv(xq, qparams, weight, weight_scale, bias, stride, padding, dilation, dtype)
    if channel_add is not None:
        y = y + channel_add.view(*channel_add.shape, *[1] * (y.dim() - 2))
    return (y if residual is None else y + residual).to(dtype)


def geglu(
    xq: torch.Tensor,
    qparams: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_qparams: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ``reference.geglu``."""
    value, gate = linear(xq, qparams, weight, weight_scale, bias, torch.float32).chunk(2, dim=-1)
    y = value * torch.nn.functional.gelu(gate)
    return y.to(dtype) if out_qparams is None else torch.ops.onlinequant.quantize(y, out_qparams, dtype, False)


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
    y = torch.nn.functional.layer_norm(total.float(), x.shape[-1:], _float(weight), _float(bias), eps)
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
    y = torch.nn.functional.group_norm(x.float(), groups, _float(weight), _float(bias), eps)
    if silu:
        y = torch.nn.functional.silu(y)
    return torch.ops.onlinequant.quantize(y, qparams, dtype, True)


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


def _conv(
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
    if xq.dtype is not torch.uint8:
        return emulated.conv(xq, qparams, weight, weight_scale, bias, stride, padding, dilation, dtype)
    packed = _packed_weights.get(weight.data_ptr())
    if packed is None:
        packed = _pack_conv(weight, stride, padding, dilation)
    _, zero_point, scale = qparams.tolist()
    layout = CHANNELS_LAST[xq.dim()]
    b = None if bias is None else bias.float().contiguous()
    x = xq.contiguous(memory_format=layout)
    y = _qconv(x, scale, zero_point, packed, weight_scale, b, stride, padding, dilation, dtype)
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    zeros = _zero_points(weight_scale.shape[0])
    return torch.ops.onednn.qconv_pointwise(
        x,
        scale,
        int(zero_point),
        packed,
        weight_scale,
        zeros,
        bias,
        list(stride),
        list(padding),
        list(dilation),
        1,
        1.0,
        0,
        _fused_dtype(dtype),
        "none",
        [],
        "",
    )


def _pack_linear(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.contiguous()
    if has_vnni():
        return torch.ops.onednn.qlinear_prepack(weight, None)
    return _pack_conv(weight[:, :, None, None], (1, 1), (0, 0), (1, 1))


def _pack_conv(
    weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> torch.Tensor:
    # Scales and zero points are given anew at every call; here they only tell oneDNN that there will be some.
    scales = torch.ones(weight.shape[0], dtype=torch.float32, device="cpu")
    return torch.ops.onednn.qconv_prepack(
        weight.contiguous(), scales, 1.0, 128, list(stride), list(padding), list(dilation), 1, None
    )


def _fused_dtype(dtype: torch.dtype) -> torch.dtype:
    # Without AVX-512, oneDNN writes anything but float32 with a reference loop, hundreds of times slower.
    return dtype if dtype is torch.bfloat16 and has_vnni() else torch.float32


@lru_cache(maxsize=256)
def _zero_points(channels: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(channels, dtype=torch.int64, device="cpu")
