"""The ops that rewritten graphs are made of.

``onlinequant::quantize`` is a composite: AOTAutograd decomposes it, and Inductor fuses it into whatever produced its
input (GroupNorm and SiLU, LayerNorm, a residual add). ``onlinequant::linear``, ``onlinequant::geglu`` and
``onlinequant::conv`` are opaque: one kernel each, with scale, bias and what else there is in its epilogue. Scales are
tensors, never Python numbers, so that equal layers share one generated kernel and a changed scale needs no new compile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .kernels import clip_counting, formats, x86
from .kernels.nvidia import operators, precompile
from .tensors import CHANNELS_LAST

_library = torch.library.Library("onlinequant", "DEF")
# Inductor must hand a kernel the memory layout that the graph was traced with.
_tags = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),)
_WEIGHTED = "Tensor xq, Tensor qparams, Tensor weight, Tensor weight_scale, Tensor? bias"

_library.define("quantize(Tensor x, Tensor qparams, ScalarType dtype, bool channels_last, bool clamp=True) -> Tensor")
_library.define(f"linear({_WEIGHTED}, ScalarType dtype) -> Tensor", tags=_tags)
_library.define(f"geglu({_WEIGHTED}, Tensor? out_qparams, ScalarType dtype) -> Tensor", tags=_tags)
_library.define(
    "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor qparams, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    tags=_tags,
)
_library.define(
    "group_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor qparams, "
    "ScalarType dtype) -> Tensor",
    tags=_tags,
)
_library.define(
    f"conv({_WEIGHTED}, int[] stride, int[] padding, int[] dilation, ScalarType dtype, "
    "Tensor? residual=None, Tensor? channel_add=None) -> Tensor",
    tags=_tags,
)


def _quantize(
    x: torch.Tensor, qparams: torch.Tensor, dtype: torch.dtype, channels_last: bool, clamp: bool = True
) -> torch.Tensor:
    """Affine quantization: clamp(round(x / scale + zero_point), *limits of the dtype); float8 rounds by itself. What is
    not finite becomes ``formats.NOT_FINITE``.

    ``x``: any float dtype, any shape. ``qparams``: float32 [3], holding 1 / scale, zero point and scale; the zero point
    of int8 and float8 is 0. ``channels_last``: whether the result (four or five dimensions) is laid out for a
    convolution. ``clamp=False`` leaves it to the conversion to saturate, as that of compiled CUDA graphs does.
    """
    q = x.float() * qparams[0]
    if dtype is torch.uint8:
        q = q + qparams[1]
    if not dtype.is_floating_point:
        q = torch.round(q)
    limited = torch.clamp(q, *formats.LIMITS[dtype]) if clamp else q
    q = torch.where(q.abs() < torch.inf, limited, formats.NOT_FINITE[dtype]).to(dtype)
    if not channels_last:
        return q.contiguous()
    return q.contiguous(memory_format=CHANNELS_LAST[x.dim()])


def _linear_fake(
    xq: torch.Tensor,
    qparams: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return xq.new_empty((*xq.shape[:-1], weight.shape[0]), dtype=dtype)


def _geglu_fake(
    xq: torch.Tensor,
    qparams: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_qparams: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return xq.new_empty((*xq.shape[:-1], weight.shape[0] // 2), dtype=dtype)


def _layer_norm_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    qparams: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.new_empty(x.shape if residual is not None else (0,))
    return total, x.new_empty(x.shape, dtype=dtype)


def _group_norm_fake(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    qparams: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    layout = CHANNELS_LAST[x.dim()]
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)


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
    residual: torch.Tensor | None = None,
    channel_add: torch.Tensor | None = None,
) -> torch.Tensor:
    spatial = [
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, dil in zip(xq.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    layout = CHANNELS_LAST[xq.dim()]
    shape = (xq.shape[0], weight.shape[0], *spatial)
    return torch.empty(shape, dtype=dtype, device=xq.device, memory_format=layout)


_library.impl("quantize", _quantize, "CompositeImplicitAutograd")
for _name, _fake in (
    ("linear", _linear_fake),
    ("geglu", _geglu_fake),
    ("layer_norm", _layer_norm_fake),
    ("group_norm", _group_norm_fake),
    ("conv", _conv_fake),
):
    for _device, _kernels in (("CPU", x86), ("CUDA", operators)):
        _kernel = getattr(_kernels, _name)
        _library.impl(_name, _kernel if _name.endswith("_norm") else clip_counting.counted(_kernel), _device)
    torch.library.register_fake(
        f"onlinequant::{_name}", precompile.noted(_fake, getattr(operators, _name)), lib=_library
    )

quantize = torch.ops.onlinequant.quantize.default
linear = torch.ops.onlinequant.linear.default
layer_norm = torch.ops.onlinequant.layer_norm.default
group_norm = torch.ops.onlinequant.group_norm.default
geglu = torch.ops.onlinequant.geglu.default
conv = torch.ops.onlinequant.conv.default
