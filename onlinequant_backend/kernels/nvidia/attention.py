"""Attention with 8-bit operands: softmax(q k^T) v in one pass over the keys, without the matrix of weights (Dao,
"FlashAttention-2", 2023).

``attention_operands`` has keys and values in 8 bit first. Queries become 8 bit here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_operands import head_of, magnitudes, prepare, scale_of
from .epilogue import rounded
from .launch import launch
from .tuning import TMA, Tile

LARGEST_HEAD = 256
# Weights of up to 1 are stored as up to 256, so that fp8 holds those down to 2^-17.
_WEIGHT_BITS = tl.constexpr(8)


@triton.jit
def _prepared(source, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_TMA: tl.constexpr):
    """A block of what ``_prepare_kernel`` wrote, all of which is there."""
    if IS_TMA:
        block = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        block = tl.load(source + rows.to(tl.int64)[:, None] * stride + (column + tl.arange(0, COLUMNS))[None, :])
    return block


@triton.jit
def _in_float(
    v, head, b, h, start, column, stride, tokens, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_TMA: tl.constexpr
):
    """A block of values [ROWS, COLUMNS] as they are, zero beyond their ends; ``head``: where the tokens begin."""
    if IS_TMA:
        block = v.load([b, h, start, column]).reshape(ROWS, COLUMNS)
    else:
        token = start + tl.arange(0, ROWS)
        d = column + tl.arange(0, COLUMNS)
        inside = (token < tokens)[:, None] & (d < size)[None, :]
        block = tl.load(head + token.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def _as_factor(p):
    """8-bit ``p`` [*, tokens] with its columns in ``_order``. Of each 16 columns of a product, a thread has 2t, 2t + 1,
    2t + 8 and 2t + 9, and of a factor 4t to 4t + 3: like this they are the same, and nothing moves."""
    ROWS: tl.constexpr = p.shape[0]
    COLUMNS: tl.constexpr = p.shape[1]
    return p.reshape(ROWS, COLUMNS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, COLUMNS)


@triton.jit
def _add_block(
    largest,
    total,
    sums,
    sums_rest,
    v_scale,
    block_q,
    keys,
    values,
    place,
    block,
    blocks,
    tokens,
    size,
    D: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_TMA: tl.constexpr,
    IS_V_TMA: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    """Add one block of keys and values to what the blocks before it gave: the ``largest`` exponent of each row, the
    ``total`` of its weights relative to that, and the weighted sums of values, in units of ``v_scale``."""
    q, q_rest, q_scale = block_q
    kq, kq_rest, k_scales = keys
    v, v_rest, v_scales, v_head, v_stride = values
    sequence, b, h = place
    STORED: tl.constexpr = D + REST
    start = block * BLOCK
    row = sequence * (blocks * BLOCK) + start
    factor = q_scale * tl.load(k_scales + sequence * blocks + block)
    s = tl.dot(q, _prepared(kq, row, 0, STORED, BLOCK, D, IS_TMA).T)
    if REST > 0:
        s = tl.dot(q_rest, _prepared(kq_rest, row, D, STORED, BLOCK, REST, IS_TMA).T, s, out_dtype=s.dtype)
    s = s.to(tl.float32)
    if IS_LAST:
        s = tl.where((start + tl.arange(0, BLOCK) < tokens)[None, :], s, float("-inf"))
    now = tl.maximum(largest, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor[:, None] - (now - _WEIGHT_BITS)[:, None])
    shrink = tl.exp2(largest - now)
    total = total * shrink + tl.sum(p, 1)
    if IS_FP8:
        # Added in float32: tensor cores add fp8 products up with 14 bits of mantissa, which many blocks would show.
        scale = tl.load(v_scales + sequence * blocks + block)
        shrink *= v_scale / scale
        v_scale = scale
        p = _as_factor(p.to(tl.float8e4nv))
        row = sequence * STORED
        sums = sums * shrink[:, None] + tl.dot(p, _prepared(v, row, start, blocks * BLOCK, D, BLOCK, IS_TMA).T)
        if REST > 0:
            rest = _prepared(v_rest, row + D, start, blocks * BLOCK, REST, BLOCK, IS_TMA).T
            sums_rest = sums_rest * shrink[:, None] + tl.dot(p, rest)
    else:
        y = _in_float(v, v_head, b, h, start, 0, v_stride, tokens, size, BLOCK, D, IS_V_TMA)
        sums = tl.dot(p.to(y.dtype), y, sums * shrink[:, None])
        if REST > 0:
            y = _in_float(v_rest, v_head, b, h, start, D, v_stride, tokens, size, BLOCK, REST, IS_V_TMA)
            sums_rest = tl.dot(p.to(y.dtype), y, sums_rest * shrink[:, None])
    return now, total, sums, sums_rest, v_scale


@triton.jit
def _attention_kernel(
    q,
    kq,
    kq_rest,
    k_scales,
    v,
    v_rest,
    v_scales,
    out,
    scale,
    heads,
    queries,
    tokens,
    size,
    blocks,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    REST: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_TMA: tl.constexpr,
    IS_V_TMA: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """A block of queries of a sequence. q as given, kq and v as ``_prepare_kernel`` has them or, unless IS_FP8, v as
    given; out [batch, queries, heads, size]. ``scale``: of the exponents to the base 2. A head has two parts, of D and
    REST."""
    DTYPE: tl.constexpr = tl.float8e4nv if IS_FP8 else tl.int8
    LANES: tl.constexpr = REST if REST > 0 else 16
    q_blocks = tl.cdiv(queries, BLOCK_Q)
    sequence = tl.program_id(0) // q_blocks
    b = sequence // heads
    h = sequence % heads
    row = tl.program_id(0) % q_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, D)
    d_rest = D + tl.arange(0, LANES)
    inside = (row < queries)[:, None] & (d < size)[None, :]
    inside_rest = (row < queries)[:, None] & (d_rest < size)[None, :]

    rows = head_of(q, sequence, heads, q_stride_b, q_stride_h) + row.to(tl.int64)[:, None] * q_stride_n
    x = tl.load(rows + d[None, :], mask=inside, other=0.0).to(tl.float32) * scale
    x_rest = tl.load(rows + d_rest[None, :], mask=inside_rest, other=0.0).to(tl.float32) * scale
    q_scale = scale_of(tl.maximum(tl.max(magnitudes(x), 1), tl.max(magnitudes(x_rest), 1)), DTYPE)
    inverse = (1.0 / q_scale)[:, None]
    x = rounded(x * inverse, DTYPE)
    x_rest = rounded(x_rest * inverse, DTYPE)

    if IS_FP8 or IS_V_TMA:
        v_head = 0
    else:
        v_head = head_of(v, sequence, heads, v_stride_b, v_stride_h)
    block_q = (x, x_rest, q_scale)
    keys = (kq, kq_rest, k_scales)
    values = (v, v_rest, v_scales, v_head, v_stride_n)
    place = (sequence, b, h)
    largest = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_Q, D), dtype=tl.float32)
    sums_rest = tl.zeros((BLOCK_Q, LANES), dtype=tl.float32)
    v_scale = 1.0
    for block in range(tokens // BLOCK):
        largest, total, sums, sums_rest, v_scale = _add_block(
            *(largest, total, sums, sums_rest, v_scale, block_q, keys, values, place, block, blocks, tokens, size),
            *(D, REST, BLOCK, IS_FP8, IS_TMA, IS_V_TMA, False),
        )
    if HAS_TAIL:
        largest, total, sums, sums_rest, v_scale = _add_block(
            *(largest, total, sums, sums_rest, v_scale, block_q, keys, values, place, blocks - 1, blocks, tokens, size),
            *(D, REST, BLOCK, IS_FP8, IS_TMA, IS_V_TMA, True),
        )

    y = v_scale / total
    places = out + ((b.to(tl.int64) * queries + row)[:, None] * heads + h) * size
    tl.store(places + d[None, :], (sums * y[:, None]).to(out.dtype.element_ty), mask=inside)
    if REST > 0:
        tl.store(places + d_rest[None, :], (sums_rest * y[:, None]).to(out.dtype.element_ty), mask=inside_rest)


def parts_of(size: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that hold a head of this size: the products' sizes are powers of two."""
    whole = max(triton.next_power_of_2(size), 32)
    first = whole // 2
    rest = max(triton.next_power_of_2(size - first), 32)
    return (whole, 0) if first < 32 or first + rest >= whole else (first, rest)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dtype: torch.dtype, out: torch.Tensor, tile: Tile
) -> None:
    """Write softmax(``scale`` * ``q`` k^T) v into ``out`` [batch, queries, heads, size], which is contiguous.

    ``q`` [batch, heads, queries, size], ``k`` and ``v`` [batch, heads, tokens, size]: float16 or bfloat16, any strides
    but the last, which is 1; there are queries and tokens. The size is at most ``LARGEST_HEAD``. ``dtype``: float8 for
    both products, or int8 for the first one, with the second in float. ``tile``: columns are tokens.
    """
    batch, heads, queries, size = q.shape
    tokens, block = k.shape[2], tile.columns
    D, REST = parts_of(size)
    widths = (D, REST or D)
    kq, k_scales, vq, v_scales = prepare(k, v, dtype, D + REST, block)
    is_tma = tile.kernel == TMA
    is_v_tma = is_tma and vq is None and _has_descriptor(v)
    keys: list[Any] = [kq, kq]
    values: list[Any] = [v, v] if vq is None else [vq, vq]
    if is_tma:
        keys = [TensorDescriptor.from_tensor(kq.flatten(0, 1), [block, width]) for width in widths]
    if is_tma and vq is not None:
        values = [TensorDescriptor.from_tensor(vq.flatten(0, 1), [width, block]) for width in widths]
    elif is_v_tma:
        values = [TensorDescriptor.from_tensor(v, [1, 1, block, width]) for width in widths]
    launch(_attention_kernel, triton.cdiv(queries, tile.rows) * batch * heads)(
        *(
            q,
            *keys,
            k_scales,
            *values,
            k_scales if v_scales is None else v_scales,
            out,
            scale * math.log2(math.e),
            heads,
            queries,
            tokens,
            size,
        ),
        *(k_scales.shape[1], *q.stride()[:3], *v.stride()[:3]),
        BLOCK_Q=tile.rows,
        BLOCK=block,
        D=D,
        REST=REST,
        IS_FP8=vq is not None,
        IS_TMA=is_tma,
        IS_V_TMA=is_v_tma,
        HAS_TAIL=tokens % block != 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _has_descriptor(v: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch blocks of ``v``: everything begins at multiples of 16 bytes."""
    bytes_apart = [stride * v.element_size() for stride in v.stride()[:3]]
    return v.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in bytes_apart)
