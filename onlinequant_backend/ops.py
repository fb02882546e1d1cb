"""The ops that rewritten graphs are made of.

``onlinequant::quantize`` is a composite: AOTAutograd decomposes it, and Inductor fuses it into whatever produced its
input (GroupNorm and SiLU, LayerNorm, a residual add). ``onlinequant::linear``, ``onlinequant::geglu`` and
``onlinequant::conv`` are opaque: one kernel each, with scale, bias and what else there is in its epilogue.
``onlinequant::attention`` is opaque, too, and quantizes its operands itself. Scales are
tensors, never Python numbers, so that equal layers share one generated kernel and a changed scale needs no new compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .graph.conv_geometry import ConvGeometry
from .kernels import clip_counting, formats
from .kernels.nvidia import operators, precompile
from .kernels.operands import Operands
from .kernels.provider import PROVIDERS
from .tensors import CHANNELS_LAST

_library = torch.library.Library("onlinequant", "DEF")
# Inductor must hand a kernel the memory layout that the graph was traced with.
_tags = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),)
_WEIGHTED = "Tensor xq, Tensor qparams, Tensor weight, Tensor weight_scale, Tensor? bias"

_library.define("quantize(Tensor x, Tensor qparams, ScalarType dtype, bool channels_last, bool clamp=True) -> Tensor")


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


def _linear_fake(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    xq, weight = operands.xq, operands.weight
    return xq.new_empty((*xq.shape[:-1], weight.shape[0]), dtype=dtype)


def _geglu_fake(operands: Operands, out_qparams: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    xq, weight = operands.xq, operands.weight
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


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, format: str) -> torch.Tensor:
    if format != formats.FLOAT:
        formats.attention_dtype(format)
    batch, heads, queries, size = q.shape
    if k.shape != v.shape or k.shape[3] != size:
        raise ValueError(f"attention needs heads of one size, and these are of {size}, {k.shape[3]} and {v.shape[3]}")
    return q.new_empty((batch, queries, heads, size)).transpose(1, 2)


def _conv_fake(
    operands: Operands,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    channel_add: torch.Tensor | None = None,
) -> torch.Tensor:
    xq, weight = operands.xq, operands.weight
    shape = (xq.shape[0], weight.shape[0], *geometry.output_size(xq.shape[2:], weight.shape[2:]))
    return torch.empty(shape, dtype=dtype, device=xq.device, memory_format=CHANNELS_LAST[xq.dim()])


def _of_operands(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, which takes ``Operands``, as torch calls an op: a schema has no tuples of its own."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        return kernel(Operands(*args[:5]), *args[5:])

    return run


def _of_geometry(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a ``kernel`` whose second argument is a ``ConvGeometry``."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        stride, padding, dilation = args[5:8]
        geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation))
        return kernel(Operands(*args[:5]), geometry, *args[8:])

    return run


def _as_it_is(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return kernel


_Function = Callable[..., Any]


class _Op(NamedTuple):
    """An op of which every provider has a kernel.

    Attributes:
        adapt: makes of a kernel what torch calls with the arguments of the schema.
        fake: makes a result of the right shape and layout.
        schema: arguments and result.
    """

    adapt: Callable[[_Function], _Function]
    fake: _Function
    schema: str


_OPS = {
    "linear": _Op(_of_operands, _linear_fake, f"({_WEIGHTED}, ScalarType dtype) -> Tensor"),
    "geglu": _Op(_of_operands, _geglu_fake, f"({_WEIGHTED}, Tensor? out_qparams, ScalarType dtype) -> Tensor"),
    "conv": _Op(
        _of_geometry,
        _conv_fake,
        f"({_WEIGHTED}, int[] stride, int[] padding, int[] dilation, ScalarType dtype, Tensor? residual=None, "
        "Tensor? channel_add=None) -> Tensor",
    ),
    "layer_norm": _Op(
        _as_it_is,
        _layer_norm_fake,
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor qparams, ScalarType dtype) "
        "-> (Tensor, Tensor)",
    ),
    "group_norm": _Op(
        _as_it_is,
        _group_norm_fake,
        "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor qparams, ScalarType dtype) "
        "-> Tensor",
    ),
    "attention": _Op(_as_it_is, _attention_fake, "(Tensor q, Tensor k, Tensor v, float scale, str format) -> Tensor"),
}


def as_op(name: str, kernels: object) -> Callable[..., Any]:
    """The kernel of an op that a provider has, to be called with the arguments of the op's schema."""
    return _OPS[name].adapt(getattr(kernels, name))


_library.impl("quantize", _quantize, "CompositeImplicitAutograd")
for _name, _op in _OPS.items():
    _library.define(_name + _op.schema, tags=_tags)
    for _key, _kernels in {provider.dispatch_key: provider.kernels for provider in PROVIDERS}.items():
        _kernel = as_op(_name, _kernels)
        _library.impl(_name, _kernel if _op.adapt is _as_it_is else clip_counting.counted(_kernel), _key)
    _noted = precompile.noted(_op.adapt(_op.fake), as_op(_name, operators))
    torch.library.register_fake(f"onlinequant::{_name}", _noted, lib=_library)

quantize = torch.ops.onlinequant.quantize.default
linear = torch.ops.onlinequant.linear.default
layer_norm = torch.ops.onlinequant.layer_norm.default
group_norm = torch.ops.onlinequant.group_norm.default
geglu = torch.ops.onlinequant.geglu.default
conv = torch.ops.onlinequant.conv.default
attention = torch.ops.onlinequant.attention.default
