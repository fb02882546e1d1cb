"""Attention with fp8 operands on Hopper GPUs, in Gluon: an experiment, which ``gluon_attention_check`` tries.

On an H200 it takes half of the time of cuDNN's float16 kernel (90 for 183 us at SDXL's 4,096 tokens, 5.3 for 11.5 ms at
SVD's 9,216, 257 for 434 us at FLUX.1's), and its results are wrong, so no model uses it yet.

One warp fetches keys and values; two groups of four warps have 64 queries each, and the weights of one are computed
while another multiplies (Shah et al., "FlashAttention-3", 2024). What limits attention with 8-bit products is not these
but what becomes of each score in between: see ``gluon_softmax``.
"""

# Gluon compiles neither [STAGES, *shape] nor early returns.
# ruff: noqa: RUF005

from __future__ import annotations

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from benchmarks.gluon_softmax import as_weights, left, packed, product, weights_of
from onlinequant_backend.kernels.nvidia.attention_operands import magnitudes, prepare, scale_of
from onlinequant_backend.kernels.nvidia.epilogue import rounded
from onlinequant_backend.kernels.nvidia.gluon_conv import swizzled
from onlinequant_backend.kernels.nvidia.gluon_names import (
    TensorDescriptor,
    async_load,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from onlinequant_backend.kernels.nvidia.launch import processors

_ROWS = gl.constexpr(64)  # queries of a group of warps
_PARTS = gl.constexpr(2)  # groups
_WARPS = gl.constexpr(4)
_ONES = gl.constexpr(8)  # the least columns of a product
_BLOCKS = {64: 256, 128: 128}  # tokens, by the columns of a head


@gluon.jit
def _fetch(box, row, column, full, empty, ring, i, STAGES: gl.constexpr):
    """Have the next block copied into shared memory, as soon as there is room."""
    stage = i % STAGES
    mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), box.block_type.nbytes)
    async_load(box, [row, column], full.index(stage), ring.index(stage))


@gluon.jit
def _produce(k, v, rings, sizes, tiles, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """Fetch the keys and values of all of a program's tiles."""
    keys, values, full_k, empty_k, full_v, empty_v, _ = rings
    _, _, _, _, blocks, q_blocks = sizes
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sequence = tile // q_blocks
        for block in range(blocks):
            _fetch(k, (sequence * blocks + block) * BLOCK, 0, full_k, empty_k, keys, i, STAGES)
            _fetch(v, sequence * D, block * BLOCK, full_v, empty_v, values, i, STAGES)
            i += 1


@gluon.jit
def _queries(q, place, scale, sizes, D: gl.constexpr, BLOCK: gl.constexpr):
    """A group's queries in 8 bit, the left operand of a product with keys, and their scales.

    So small that no score exceeds what float16 holds: keys are at most 448.
    """
    _, _, queries, size, _, _ = sizes
    head, row0, stride = place
    LIMIT: gl.constexpr = 65504.0 / 448.0 / D
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [_WARPS, 1], [1, 0])
    row = row0 + gl.arange(0, _ROWS, gl.SliceLayout(1, blocked))
    d = gl.arange(0, D, gl.SliceLayout(0, blocked))
    inside = (row < queries)[:, None] & (d < size)[None, :]
    x = gl.load(q + head + row.to(gl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)
    x = x.to(gl.float32) * scale
    q_scale = scale_of(gl.max(magnitudes(x), 1), gl.float8e4nv) * (448.0 / LIMIT)
    x = rounded(x * (1.0 / q_scale)[:, None], gl.float8e4nv)
    rows: gl.constexpr = gl.SliceLayout(1, product(BLOCK))
    return gl.convert_layout(x, left(BLOCK)), gl.convert_layout(q_scale, rows)


@gluon.jit
def _scores(x, rings, i, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """Start the product of queries and a block of keys."""
    keys, _, full_k, _, _, _, _ = rings
    mbarrier.wait(full_k.index(i % STAGES), i // STAGES & 1)
    zeros = gl.zeros([_ROWS, BLOCK], gl.float16, product(BLOCK))
    return warpgroup_mma(x, keys.index(i % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _weighted(p, sums, totals, rings, i, ADDS: gl.constexpr, STAGES: gl.constexpr):
    """Start the products of weights with a block of values, which is there, and with ones, added to ``sums`` and
    ``totals`` or apart from these."""
    _, values, _, _, _, _, ones = rings
    p = as_weights(p)
    right = values.index(i % STAGES).permute((1, 0))
    new = warpgroup_mma(p, right, sums, use_acc=ADDS, is_async=True)
    return new, warpgroup_mma(p, ones.permute((1, 0)), totals, use_acc=ADDS, is_async=True)


@gluon.jit
def _shrunk(sums, totals, shrink, scales, D: gl.constexpr):
    """Sums and totals relative to a new largest exponent, sums also in units of the new scale of values."""
    rows: gl.constexpr = gl.SliceLayout(1, product(D))
    rows_of_totals: gl.constexpr = gl.SliceLayout(1, product(_ONES))
    by = gl.convert_layout(shrink, rows) * scales
    return sums * by[:, None], totals * gl.convert_layout(shrink, rows_of_totals)[:, None]


@gluon.jit
def _next_scales(k_scales, v_scales, block, blocks):
    """What the next step needs, from afar: the scales of a block of keys, if there is one, and of the values before."""
    return gl.load(k_scales + gl.minimum(block, blocks - 1)), gl.load(v_scales + block - 1)


@gluon.jit
def _step(
    state,
    x,
    q_scale,
    k_scales,
    v_scales,
    rings,
    i,
    block,
    blocks,
    tokens,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    IS_LAST: gl.constexpr,
):
    """Multiply the last block's weights with its values, and in the meantime have a block's scores and weights.

    ``state``: the last block's weights, by what sums shrink before they are added to those, the largest exponent, sums
    and totals, the scale of values, and ``_next_scales``.
    """
    p, shrink, largest, sums, totals, v_scale, scales = state
    k_scale, scale = scales
    _, _, _, empty_k, full_v, empty_v, _ = rings
    scores = _scores(x, rings, i, BLOCK, STAGES)
    # Where nothing was added before, there is nothing to shrink.
    sums, totals = _shrunk(sums, totals, shrink, v_scale / scale, D)
    new, new_totals = _weighted(p, sums, totals, rings, i - 1, False, STAGES)
    scales = _next_scales(k_scales, v_scales, block + 1, blocks)
    s = warpgroup_mma_wait(2, deps=(scores,))
    mbarrier.arrive(empty_k.index(i % STAGES), count=1)
    w, largest, shrink = weights_of(s, largest, q_scale * k_scale, block * BLOCK, tokens, D, IS_LAST)
    # The next step's values. Without such a loop the assembler waits for the products before it computes weights.
    mbarrier.wait(full_v.index(i % STAGES), i // STAGES & 1)
    # The registers of the last weights are taken until then.
    new, new_totals, w = warpgroup_mma_wait(0, deps=(new, new_totals, w))
    mbarrier.arrive(empty_v.index((i - 1) % STAGES), count=1)
    p = packed(w)
    sums += new
    totals += new_totals
    return p, shrink, largest, sums, totals, scale, scales


@gluon.jit
def _consume(
    given,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    PART: gl.constexpr,
    HAS_TAIL: gl.constexpr,
):
    """A group's queries of all of a program's tiles."""
    q, k_scales, v_scales, out, rings, sizes, strides, scale, tiles = given
    tokens, heads, queries, size, blocks, q_blocks = sizes
    stride_b, stride_h, stride_n = strides
    _, _, _, empty_k, full_v, empty_v, _ = rings
    full_blocks = blocks - 1 if HAS_TAIL else blocks
    result: gl.constexpr = product(D)
    i = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sequence = tile // q_blocks
        row0 = (tile % q_blocks * _PARTS + PART) * _ROWS
        head = (sequence // heads).to(gl.int64) * stride_b + (sequence % heads).to(gl.int64) * stride_h
        x, q_scale = _queries(q, (head, row0, stride_n), scale, sizes, D, BLOCK)
        of_keys = k_scales + sequence * blocks
        of_values = v_scales + sequence * blocks

        s = warpgroup_mma_wait(0, deps=(_scores(x, rings, i, BLOCK, STAGES),))
        mbarrier.arrive(empty_k.index(i % STAGES), count=1)
        k_scale = gl.load(of_keys)
        largest = gl.full([_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, product(BLOCK)))
        w, largest, shrink = weights_of(s, largest, q_scale * k_scale, 0, tokens, D, HAS_TAIL)
        p = packed(w)
        mbarrier.wait(full_v.index(i % STAGES), i // STAGES & 1)
        sums = gl.zeros([_ROWS, D], gl.float32, result)
        totals = gl.zeros([_ROWS, _ONES], gl.float32, product(_ONES))
        scales = _next_scales(of_keys, of_values, 1, blocks)
        state = (p, shrink, largest, sums, totals, 1.0, scales)
        i += 1
        for block in range(1, full_blocks):
            state = _step(
                *(state, x, q_scale, of_keys, of_values, rings, i, block, blocks, tokens),
                *(D, BLOCK, STAGES, False),
            )
            i += 1
        if HAS_TAIL and blocks > 1:
            state = _step(
                *(state, x, q_scale, of_keys, of_values, rings, i, blocks - 1, blocks, tokens),
                *(D, BLOCK, STAGES, True),
            )
            i += 1
        p, shrink, largest, sums, totals, v_scale, scales = state
        last = scales[1]
        sums, totals = _shrunk(sums, totals, shrink, v_scale / last, D)
        new, new_totals = _weighted(p, sums, totals, rings, i - 1, True, STAGES)
        sums, totals = warpgroup_mma_wait(0, deps=(new, new_totals))
        mbarrier.arrive(empty_v.index((i - 1) % STAGES), count=1)

        total = gl.convert_layout(gl.max(totals, 1), gl.SliceLayout(1, result))
        y = sums * (last / total)[:, None]
        blocked: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [_WARPS, 1], [1, 0])
        y = gl.convert_layout(y.to(out.dtype.element_ty), blocked)
        row = row0 + gl.arange(0, _ROWS, gl.SliceLayout(1, blocked))
        d = gl.arange(0, D, gl.SliceLayout(0, blocked))
        inside = (row < queries)[:, None] & (d < size)[None, :]
        at = ((sequence // heads).to(gl.int64) * queries + row)[:, None] * heads + sequence % heads
        gl.store(out + at * size + d[None, :], y, mask=inside)


@gluon.jit(do_not_specialize=["heads", "queries", "tokens", "blocks", "tiles"])
def _gluon_attention_kernel(
    q,
    k,
    k_scales,
    v,
    v_scales,
    out,
    scale,
    heads,
    queries,
    tokens,
    size,
    blocks,
    tiles,
    stride_b,
    stride_h,
    stride_n,
    STAGES: gl.constexpr,
    HAS_TAIL: gl.constexpr,
):
    """Q as given, k [tokens of all sequences, D] and v [D of all sequences, tokens] as ``prepare`` has them, out
    [batch, queries, heads, size]. A program does every so many tiles, of 128 queries of a sequence. ``scale``:
    of the exponents to the base 2."""
    BLOCK: gl.constexpr = k.block_shape[0]
    D: gl.constexpr = k.block_shape[1]
    keys = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_shape, k.layout)
    values = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_shape, v.layout)
    full_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ones = gl.allocate_shared_memory(v.dtype, [_ONES, BLOCK], v.layout)
    ones.store(gl.full([_ONES, BLOCK], 1.0, gl.float32, gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])).to(v.dtype))
    for j in gl.static_range(STAGES):
        mbarrier.init(full_k.index(j), count=1)
        mbarrier.init(empty_k.index(j), count=_PARTS)
        mbarrier.init(full_v.index(j), count=1)
        mbarrier.init(empty_v.index(j), count=_PARTS)
    fence_async_shared()
    rings = (keys, values, full_k, empty_k, full_v, empty_v, ones)
    q_blocks = gl.cdiv(queries, _PARTS * _ROWS)
    sizes = (tokens, heads, queries, size, blocks, q_blocks)
    strides = (stride_b, stride_h, stride_n)
    given = (q, k_scales, v_scales, out, rings, sizes, strides, scale, tiles)
    gl.warp_specialize(
        [
            (_consume, (given, D, BLOCK, STAGES, 0, HAS_TAIL)),
            (_consume, (given, D, BLOCK, STAGES, 1, HAS_TAIL)),
            (_produce, (k, v, rings, sizes, tiles, D, BLOCK, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _width(size: int) -> int:
    """The columns of products that hold a head of this size."""
    return 64 if size <= 64 else 128


def prepared(k: torch.Tensor, v: torch.Tensor) -> Operands:
    """Keys and values as the kernel reads them: see ``prepare``."""
    width = _width(k.shape[3])
    return prepare(k, v, torch.float8_e4m3fn, width, _BLOCKS[width])


def gluon_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor, operands: Operands | None = None
) -> None:
    """As ``attention.attention`` in float8, for heads of up to 128, on a Hopper GPU. ``operands``: what ``prepared``
    gave, if that is known."""
    batch, heads, queries, size = q.shape
    tokens = k.shape[2]
    width = _width(size)
    block = _BLOCKS[width]
    kq, k_scales, vq, v_scales = operands or prepared(k, v)
    assert vq is not None
    tiles = triton.cdiv(queries, 64 * _PARTS.value) * batch * heads
    _gluon_attention_kernel[(min(tiles, processors(q.device)),)](
        q,
        TensorDescriptor.from_tensor(kq.flatten(0, 1), [block, width], swizzled(2, width, 8)),
        k_scales,
        TensorDescriptor.from_tensor(vq.flatten(0, 1), [width, block], swizzled(2, block, 8)),
        *(v_scales, out, scale * math.log2(math.e), heads, queries, tokens, size, k_scales.shape[1], tiles),
        *q.stride()[:3],
        STAGES=2 if width == 64 else 4,
        HAS_TAIL=tokens % block != 0,
        num_warps=4,
        enable_fp_fusion=True,
    )
