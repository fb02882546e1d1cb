"""8-bit linear, convolution and attention on NVIDIA GPUs: cuBLAS or Triton, whichever ``tuning`` knows to be faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...graph.conv_geometry import ConvGeometry
from ...tensors import CHANNELS_LAST
from .. import formats
from ..operands import Operands
from . import precompile, tuning
from .gpu import gpu_of
from .tuning import CUBLAS, GLUON, TMA, Tile


def linear(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    """See ``reference.linear``."""
    xq, qparams, weight, weight_scale, bias = operands
    rows = xq.reshape(-1, xq.shape[-1])
    tile = tuning.linear_tile(rows.shape[0], weight.shape[0], weight.shape[1], xq.dtype, gpu_of(xq.device))
    y = run_linear(Operands(rows, qparams, weight, weight_scale, bias), dtype, tile)
    return y.view(*xq.shape[:-1], weight.shape[0])


def run_linear(operands: Operands, dtype: torch.dtype, tile: Tile) -> torch.Tensor:
    """``linear`` of [M, K] with the given tile."""
    if tile.kernel == CUBLAS:
        return _cublas(operands, dtype)
    rows, qparams, weight, weight_scale, bias = operands
    out = rows.new_empty((rows.shape[0], weight.shape[0]), dtype=dtype)
    if tile.kernel == TMA:
        from .matmul import matmul

        matmul(rows, qparams[2:], weight, weight_scale, bias, out, tile)
    else:
        from .gather import gather_conv

        gather_conv(rows, qparams[2:], weight, weight_scale, bias, (), (), (), out, tile)
    return out


def _cublas(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    rows, qparams, weight, weight_scale, bias = operands
    if precompile.is_ahead():  # there is nothing to compile
        return rows.new_empty((rows.shape[0], weight.shape[0]), dtype=dtype)
    fused = None if bias is None or dtype is torch.float32 else bias.to(dtype)
    # Sums in the tensor cores' own precision: those of fp8 are of 14 bits of mantissa, plenty beside 3 of each factor.
    scale, weight_scale = _aligned(qparams[2]), _aligned(weight_scale[0])
    y = torch._scaled_mm(rows, weight.t(), scale, weight_scale, bias=fused, out_dtype=dtype, use_fast_accum=True)
    return y if bias is None or fused is not None else y + bias


def _aligned(scale: torch.Tensor) -> torch.Tensor:
    """``scale`` where cuBLAS can read it. Models lay theirs out like that, but not everyone who calls the op does."""
    return scale if scale.data_ptr() % 16 == 0 else scale.clone()


def geglu(operands: Operands, out_qparams: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """See ``reference.geglu``; quantized to ``dtype`` by ``out_qparams`` if there are some."""
    from .matmul import matmul

    xq, qparams, weight, weight_scale, bias = operands
    rows = xq.reshape(-1, xq.shape[-1])
    out = rows.new_empty((rows.shape[0], weight.shape[0] // 2), dtype=dtype)
    tile = tuning.geglu_tile(weight.shape[1], gpu_of(xq.device))
    assert tile is not None  # else ``fuse_geglu`` would have left it alone
    matmul(rows, qparams[2:], weight, weight_scale, bias, out, tile, out_qparams=out_qparams, geglu=True)
    return out.view(*xq.shape[:-1], out.shape[1])


def layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    qparams: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` + ``residual``, [..., C], which is empty without a residual, and its LayerNorm in 8 bit."""
    from .layer_norm import layer_norm as triton_layer_norm

    rows = x.contiguous().view(-1, x.shape[-1])
    added = None if residual is None else residual.contiguous().view(-1, x.shape[-1])
    total = x.new_empty(0) if added is None else torch.empty_like(rows)
    out = torch.empty_like(rows, dtype=dtype)
    triton_layer_norm(rows, added, None if added is None else total, weight, bias, eps, qparams, out)
    return total if added is None else total.view(x.shape), out.view(x.shape)


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
    """GroupNorm of ``x`` [N, C, *spatial], and SiLU of that if asked for, in 8 bit and channels last."""
    from .group_norm import group_norm as triton_group_norm

    layout = CHANNELS_LAST[x.dim()]
    out = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)
    shape = (x.shape[0], -1, x.shape[1])
    pixels = _channels_inside(x).reshape(shape).contiguous()
    triton_group_norm(pixels, groups, weight, bias, eps, silu, qparams, _channels_inside(out).view(shape))
    return out


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, format: str) -> torch.Tensor:
    """See ``reference.attention``; of no more than 64 queries and tokens in float. Laid out as [batch, queries, heads,
    size], as the linear layer that reads it wants it."""
    batch, heads, queries, size = q.shape
    shape = (batch * heads, queries, k.shape[2], size)
    if format == formats.FLOAT:
        return _attention_in_float(q, k, v, scale)
    tile = tuning.attention_tile(*shape, formats.attention_dtype(format), gpu_of(q.device))
    return run_attention(q, k, v, scale, format, tile)


def _attention_in_float(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """By the kernel for short sequences, or at other sizes by torch's."""
    if fits_short(q, k):
        return run_attention(q, k, v, scale, formats.FLOAT, Tile(""))
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def fits_short(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether a kernel keeps whole sequences in registers."""
    from .short_attention import LONGEST

    return max(q.shape[2], k.shape[2]) <= LONGEST


def run_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, format: str, tile: Tile
) -> torch.Tensor:
    """``attention`` with the given tile."""
    from .attention import LARGEST_HEAD
    from .attention import attention as triton_attention
    from .short_attention import short_attention

    batch, heads, queries, size = q.shape
    if size > LARGEST_HEAD:
        raise ValueError(f"attention has heads of at most {LARGEST_HEAD}, and these are of {size}")
    out = q.new_empty((batch, queries, heads, size))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if out.numel() == 0 or k.shape[2] == 0:
        out.zero_()
    elif fits_short(q, k):
        short_attention(q, k, v, scale, out)
    else:
        triton_attention(q, k, v, scale, formats.attention_dtype(format), out, tile)
    return out.transpose(1, 2)


def conv(
    operands: Operands,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    channel_add: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``reference.conv``; channels last, as ``xq`` and ``weight`` are."""
    xq, weight = operands.xq, operands.weight
    tile = tuning.conv_tile(xq.shape, weight.shape, geometry, xq.dtype, gpu_of(xq.device))
    return run_conv(operands, geometry, dtype, tile, residual, channel_add)


def run_conv(
    operands: Operands,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    tile: Tile,
    residual: torch.Tensor | None = None,
    channel_add: torch.Tensor | None = None,
) -> torch.Tensor:
    """``conv`` with the given tile."""
    xq, qparams, weight, weight_scale, bias = operands
    if geometry.is_pointwise(weight.shape):
        return _pointwise_conv(operands, dtype, tile, residual, channel_add)
    stride, padding, dilation = geometry
    spatial = geometry.output_size(xq.shape[2:], weight.shape[2:])
    layout = CHANNELS_LAST[xq.dim()]
    shape = (xq.shape[0], weight.shape[0], *spatial)
    out = torch.empty(shape, dtype=dtype, device=xq.device, memory_format=layout)
    if residual is not None:
        residual = _channels_inside(residual.expand(shape).contiguous(memory_format=layout))
    x, w, y = _channels_inside(xq), _channels_inside(weight), _channels_inside(out)
    if channel_add is not None and channel_add.stride(1) != 1:  # rows may be parts of longer ones: see merge_linears
        channel_add = channel_add.contiguous()
    if tile.kernel in (TMA, GLUON):
        if x.dim() == 5:  # temporal: frames are rows, pixels are columns
            x, w, y = (tensor.flatten(2, 3) for tensor in (x, w, y))
            residual = None if residual is None else residual.flatten(2, 3)
        given = (x, qparams[2:], w, weight_scale, bias, (padding[0], padding[1]), y, tile)
        if tile.kernel == TMA:
            from .conv import conv as tma_conv

            tma_conv(*given, residual, channel_add, stride[-1])
        else:
            from .gluon_conv import gluon_conv

            gluon_conv(*given, channel_add, stride[-1])
            if residual is not None:
                y.add_(residual)
        return out
    from .gather import gather_conv

    gather_conv(x, qparams[2:], w, weight_scale, bias, stride, padding, dilation, y, tile, residual, channel_add)
    return out


def _pointwise_conv(
    operands: Operands,
    dtype: torch.dtype,
    tile: Tile,
    residual: torch.Tensor | None,
    channel_add: torch.Tensor | None,
) -> torch.Tensor:
    xq, qparams, weight, weight_scale, bias = operands
    x = _channels_inside(xq)
    rows = Operands(x.flatten(0, -2), qparams, weight.flatten(1), weight_scale, bias)
    y = run_linear(rows, dtype, tile)
    y = y.view(*x.shape[:-1], y.shape[1]).movedim(-1, 1)
    if channel_add is not None:
        y = y + channel_add.view(*channel_add.shape, *[1] * (y.dim() - 2))
    return (y if residual is None else y + residual).to(dtype)


def _channels_inside(tensor: torch.Tensor) -> torch.Tensor:
    """A channels-last tensor with its dimensions as they lie in memory."""
    return tensor.permute(0, *range(2, tensor.dim()), 1)
