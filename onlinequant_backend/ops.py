"""The ops that rewritten graphs are made of.

``onlinequant::quantize`` is a composite: AOTAutograd decomposes it, and Inductor fuses it into whatever produced its
input (GroupNorm and SiLU, LayerNorm, a residual add). ``onlinequant::linear`` and ``onlinequant::conv`` are opaque: one
kernel each, with scale and bias in its epilogue. Scales are tensors, never Python numbers, so that equal layers share
one generated kernel and a changed scale needs no new compile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .kernels import cpu

# All of an activation's bits are used; weights may have to spare one, see ``precision.Precision``.
ACTIVATION_BITS = 8

_library = torch.library.Library("onlinequant", "DEF")
# Inductor must hand a kernel the memory layout that the graph was traced with.
_tags = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),)

_library.define("quantize(Tensor x, Tensor qparams, int bits, bool channels_last) -> Tensor")
_library.define(
    "linear(Tensor xq, Tensor qparams, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    tags=_tags,
)
_library.define(
    "conv(Tensor xq, Tensor qparams, Tensor weight, Tensor weight_scale, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, ScalarType dtype) -> Tensor",
    tags=_tags,
)


def _quantize(x: torch.Tensor, qparams: torch.Tensor, bits: int, channels_last: bool) -> torch.Tensor:
    """Affine quantization to uint8: clamp(round(x / scale + zero_point), 0, 2**bits - 1).

    ``x``: any float dtype, any shape. ``qparams``: float32 [3], holding 1 / scale, zero point and scale.
    ``channels_last``: whether the result (four or five dimensions) is laid out for a convolution.
    """
    q = torch.clamp(torch.round(x.float() * qparams[0] + qparams[1]), 0, 2**bits - 1).to(torch.uint8)
    if not channels_last:
        return q.contiguous()
    return q.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _linear_fake(
    xq: torch.Tensor,
    qparams: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return xq.new_empty((*xq.shape[:-1], weight.shape[0]), dtype=dtype)


def _conv_fake(
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
    spatial = [
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, dil in zip(xq.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    layout = torch.channels_last if xq.dim() == 4 else torch.channels_last_3d
    shape = (xq.shape[0], weight.shape[0], *spatial)
    return torch.empty(shape, dtype=dtype, device=xq.device, memory_format=layout)


_library.impl("quantize", _quantize, "CompositeImplicitAutograd")
_library.impl("linear", cpu.linear, "CPU")
_library.impl("conv", cpu.conv, "CPU")
torch.library.register_fake("onlinequant::linear", _linear_fake, lib=_library)
torch.library.register_fake("onlinequant::conv", _conv_fake, lib=_library)

quantize = torch.ops.onlinequant.quantize.default
linear = torch.ops.onlinequant.linear.default
conv = torch.ops.onlinequant.conv.default
