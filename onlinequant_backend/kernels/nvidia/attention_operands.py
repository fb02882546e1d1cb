"""What attention's queries read: keys and values in 8 bit, laid out for its products.

Keys lose their mean over tokens, which changes no softmax and is most of what is large in them (Zhang et al.,
"SageAttention", 2024). Values are transposed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .epilogue import rounded
from .launch import launch

# Rows of zeros have a scale, too; so small that nothing in float16 comes near.
_LEAST = tl.constexpr(1e-12)


@triton.jit
def scale_of(largest, dtype: tl.constexpr):
    """By what values of up to ``largest`` are divided to be stored as ``dtype``; NaN if that is infinite, so that
    nothing that is computed from them passes for a number."""
    LIMIT: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    return tl.where(largest < float("inf"), tl.maximum(largest, _LEAST) * (1.0 / LIMIT), float("nan"))


@triton.jit
def magnitudes(x):
    """|x|, and infinity for NaN, which a maximum would pass over."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def _quantized(x, dtype: tl.constexpr):
    """Float32 ``x`` [*, *] in 8 bit, and its scale."""
    scale = scale_of(tl.max(tl.max(magnitudes(x), 1), 0), dtype)
    return rounded(x * (1.0 / scale), dtype), scale


@triton.jit
def head_of(x, sequence, heads, stride_b, stride_h):
    """Where the tokens of a sequence begin: sequences are the heads of all batch entries, one after the other."""
    return x + (sequence // heads).to(tl.int64) * stride_b + (sequence % heads).to(tl.int64) * stride_h


@triton.jit
def _order(lane):
    """Which token of its block is stored at ``lane``: see ``_as_factor``."""
    return lane // 16 * 16 + lane // 2 % 2 * 8 + lane // 4 % 4 * 2 + lane % 2


@triton.jit
def _prepare_kernel(
    k,
    v,
    kq,
    vq,
    k_scales,
    v_scales,
    heads,
    tokens,
    size,
    blocks,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STORED: tl.constexpr,
):
    """One block of tokens of a sequence: kq [sequences, blocks * BLOCK, STORED] from k, and vq [sequences, STORED,
    blocks * BLOCK] from v unless it is None, zero beyond their ends; a scale for each block."""
    sequence = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    lane = tl.arange(0, BLOCK)
    token = block * BLOCK + lane
    d = tl.arange(0, WIDTH)
    valid = (token < tokens)[:, None] & (d < size)[None, :]
    keys = head_of(k, sequence, heads, k_stride_b, k_stride_h)
    # Whatever all keys lose alike changes nothing. A sample's mean does, and makes a pass over all keys superfluous.
    samples = (lane.to(tl.int64) * tokens // BLOCK)[:, None] * k_stride_n + d[None, :]
    sample = tl.load(keys + samples, mask=(d < size)[None, :], other=0.0)
    places = token.to(tl.int64)[:, None] * k_stride_n + d[None, :]
    x = tl.load(keys + places, mask=valid, other=0.0)
    if vq is not None:  # all that comes from afar is asked for at once
        values = head_of(v, sequence, heads, v_stride_b, v_stride_h)
        token_of_v = block * BLOCK + _order(lane)
        valid_of_v = (token_of_v < tokens)[:, None] & (d < size)[None, :]
        places = token_of_v.to(tl.int64)[:, None] * v_stride_n + d[None, :]
        y = tl.load(values + places, mask=valid_of_v, other=0.0)
    mean = tl.sum(sample.to(tl.float32) * (1.0 / BLOCK), 0)
    x, scale = _quantized(tl.where(valid, x.to(tl.float32) - mean[None, :], 0.0), kq.dtype.element_ty)
    padded = blocks * BLOCK
    row = (sequence.to(tl.int64) * padded + token)[:, None]
    tl.store(kq + row * STORED + d[None, :], x, mask=(d < STORED)[None, :])
    tl.store(k_scales + tl.program_id(0), scale)
    if vq is not None:
        y, scale = _quantized(y.to(tl.float32), vq.dtype.element_ty)
        row = (sequence.to(tl.int64) * STORED + d)[:, None]
        tl.store(vq + row * padded + (block * BLOCK + lane)[None, :], y.T, mask=(d < STORED)[:, None])
        tl.store(v_scales + tl.program_id(0), scale)


def prepare(
    k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype, stored: int, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Keys in ``dtype`` [sequences, tokens, stored], and values [sequences, stored, tokens] if that is float8, with
    their scales [sequences, blocks]; tokens are filled up to whole blocks."""
    batch, heads, tokens, size = k.shape
    blocks = triton.cdiv(tokens, block)
    kq = k.new_empty((batch * heads, blocks * block, stored), dtype=dtype)
    k_scales = k.new_empty((batch * heads, blocks), dtype=torch.float32)
    vq = v_scales = None
    if dtype.is_floating_point:
        vq = k.new_empty((batch * heads, stored, blocks * block), dtype=dtype)
        v_scales = torch.empty_like(k_scales)
    launch(_prepare_kernel, blocks * batch * heads)(
        *(k, v, kq, vq, k_scales, v_scales, heads, tokens, size, blocks, *k.stride()[:3], *v.stride()[:3]),
        BLOCK=block,
        WIDTH=triton.next_power_of_2(stored),
        STORED=stored,
        num_warps=8 if block * stored > 8192 else 4,
    )
    return kq, k_scales, vq, v_scales
