"""8-bit 2-d convolution of stride 1 or 2 on Hopper GPUs, in Gluon: like ``conv``, but with layouts and warps in our own
hands, and a fifth faster.

Triton's ``reshape`` of a box that the tensor memory accelerator (TMA) fetched sends it through registers. A box of
[n, h, w, 128 bytes] is in shared memory the same bytes as a matrix of [n * h * w, 128 bytes], so here both operands go
from shared memory right into the tensor cores. One warp fetches, for one block of the result after the other, and two
groups of four warps multiply a half of each block's pixels: the operands of the next block arrive while the last is
stored.
"""

# Gluon does not compile [STAGES, *shape].
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .conv import pixel_block
from .gluon_epilogue import finish, load_coefficients, new_room
from .gluon_names import (
    TensorDescriptor,
    async_load,
    fence_async_shared,
    mbarrier,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .launch import launch, processors
from .tuning import Tile

_PARTS = 2  # of a block, each multiplied by a group of warps of its own
_WARPS = 4  # of a group
_CHUNK = 64  # columns that the TMA stores at a time: a row of them is 128 bytes in 16 bit


@gluon.jit
def _place(block, sizes, BLOCK: gl.constexpr, BLOCK_K: gl.constexpr):
    """The first image, row, column and output channel of a block.

    A group of pixel tiles runs through all output channels together: they share the weights in the L2 cache.
    """
    N, H_out, W_out, _, K, _, _ = sizes
    GROUP: gl.constexpr = 8
    tiles_h = gl.cdiv(H_out, BLOCK[1])
    tiles_w = gl.cdiv(W_out, BLOCK[2])
    tiles = gl.cdiv(N, BLOCK[0]) * tiles_h * tiles_w
    blocks_k = gl.cdiv(K, BLOCK_K)
    group = block // (GROUP * blocks_k)
    members = gl.minimum(tiles - group * GROUP, GROUP)
    within = block % (GROUP * blocks_k)
    tile = group * GROUP + within % members
    k0 = within // members * BLOCK_K
    w0 = tile % tiles_w * BLOCK[2]
    h0 = tile // tiles_w % tiles_h * BLOCK[1]
    n0 = tile // (tiles_w * tiles_h) * BLOCK[0]
    return n0, h0, w0, k0


@gluon.jit
def _fetch(x, w, pixels, weights, full, place, sizes, tap, c, KERNEL_W: gl.constexpr, STRIDE: gl.constexpr):
    """Have a block of ``pixels`` and of ``weights`` copied into shared memory, for channels ``c``... of a tap.

    Beyond the image and beyond C the pixels are zero. Beyond C the weights are the next tap's, which does not matter.
    """
    n0, h0, w0, k0 = place
    _, _, _, C, _, padding_h, padding_w = sizes
    dh = tap // KERNEL_W - padding_h
    dw = tap % KERNEL_W - padding_w
    mbarrier.expect(full, x.block_type.nbytes + w.block_type.nbytes)
    if STRIDE == 1:
        async_load(x, [n0, h0 + dh, w0 + dw, c], full, pixels)
    else:
        at = [n0, h0 + (dh >> 1), dh & 1, w0 + (dw >> 1), (dw & 1) * C + c]
        async_load(x, at, full, pixels)
    async_load(w, [k0, tap * C + c], full, weights)


@gluon.jit
def _no_sums(dtype: gl.constexpr, ROWS: gl.constexpr, BLOCK_K: gl.constexpr):
    """Zeros [ROWS, BLOCK_K] in the layout of a product."""
    WARPS: gl.constexpr = gl.num_warps()
    # Triton knows no instruction of int8 with more than 224 columns.
    COLUMNS: gl.constexpr = 128 if dtype == gl.int8 and BLOCK_K > 128 else BLOCK_K
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 32])
    if dtype == gl.int8:
        sums = gl.zeros([ROWS, BLOCK_K], gl.int32, layout)
    else:
        sums = gl.zeros([ROWS, BLOCK_K], gl.float32, layout)
    return sums


@gluon.jit
def _multiply(pixels, weights, sums, PART: gl.constexpr, PARTS: gl.constexpr):
    """Start adding the products of a block of pixels [n, h, w, C] (a part of it) and weights [BLOCK_K, C]."""
    BLOCK_C: gl.constexpr = weights.shape[1]
    ROWS: gl.constexpr = sums.shape[0]
    a = pixels.reshape([ROWS * PARTS, BLOCK_C]).slice(PART * ROWS, ROWS)
    return warpgroup_mma(a, weights.permute((1, 0)), sums, is_async=True)


@gluon.jit
def _produce(
    x,
    w,
    rings,
    sizes,
    blocks,
    KERNEL_W: gl.constexpr,
    TAPS: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
):
    """Fetch the operands of all of a program's blocks, each stage as soon as it is free."""
    pixels, weights, full, empty = rings
    STAGES: gl.constexpr = full.shape[0]
    BLOCK_C: gl.constexpr = w.block_shape[1]
    C = sizes[3]
    i = 0
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        place = _place(block, sizes, BLOCK, w.block_shape[0])
        for tap in range(TAPS):
            for c in range(0, C, BLOCK_C):
                s = i % STAGES
                mbarrier.wait(empty.index(s), (i // STAGES & 1) ^ 1)
                _fetch(
                    x,
                    w,
                    pixels.index(s),
                    weights.index(s),
                    full.index(s),
                    place,
                    sizes,
                    tap,
                    c,
                    KERNEL_W,
                    STRIDE,
                )
                i += 1


@gluon.jit
def _consume(
    rings,
    room,
    sizes,
    ends,
    blocks,
    TAPS: gl.constexpr,
    BLOCK: gl.constexpr,
    PART: gl.constexpr,
    PARTS: gl.constexpr,
):
    """Multiply, add up and store one of PARTS of the pixels of all of a program's blocks."""
    pixels, weights, full, empty = rings
    STAGES: gl.constexpr = full.shape[0]
    BLOCK_K: gl.constexpr = weights.shape[1]
    BLOCK_C: gl.constexpr = weights.shape[2]
    ROWS: gl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2] // PARTS
    steps = TAPS * gl.cdiv(sizes[3], BLOCK_C)
    i = 0
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        sums = _no_sums(pixels.dtype, ROWS, BLOCK_K)
        for step in range(steps):
            s = i % STAGES
            mbarrier.wait(full.index(s), i // STAGES & 1)
            running = _multiply(pixels.index(s), weights.index(s), sums, PART, PARTS)
            sums = warpgroup_mma_wait(1, deps=(running,))
            # The product before this one is complete; in the first step that was the last block's, already told.
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=step > 0)
            i += 1
        place = _place(block, sizes, BLOCK, BLOCK_K)
        coefficients = load_coefficients(sums, place, sizes, ends, BLOCK)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        finish(sums, coefficients, room, place, sizes, ends, BLOCK, PART)
    if ends[1] is not None:
        store_wait(0)


@gluon.jit
def _gluon_conv_kernel(
    x,
    w,
    out_boxes,
    out,
    scale,
    weight_scale,
    bias,
    channel_add,
    weight_stride,
    channel_stride,
    N,
    H_out,
    W_out,
    C,
    K,
    padding_h,
    padding_w,
    blocks,
    KERNEL_W: gl.constexpr,
    TAPS: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    STRIDE: gl.constexpr,
    PARTS: gl.constexpr,
):
    """X [N, H, W, C], or as pairs with a STRIDE of 2, w [K, TAPS * C], out [N, H_out, W_out, K], weight_scale and bias
    [K], channel_add [N, K]. A program does every so many blocks."""
    sizes = (N, H_out, W_out, C, K, padding_h, padding_w)
    ends = (out, out_boxes, scale, weight_scale, bias, channel_add, weight_stride, channel_stride)
    pixels = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_shape, x.layout)
    weights = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_shape, w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(STAGES):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(empty.index(j), count=PARTS)
    fence_async_shared()
    rings = (pixels, weights, full, empty)
    room = new_room(ends, full, PARTS)
    gl.warp_specialize(
        [
            (_consume, (rings, room, sizes, ends, blocks, TAPS, BLOCK, 0, PARTS)),
            (_consume, (rings, room, sizes, ends, blocks, TAPS, BLOCK, 1, PARTS)),
            (_produce, (x, w, rings, sizes, blocks, KERNEL_W, TAPS, BLOCK, STRIDE)),
        ],
        [4, 1],
        [240, 24],
    )


def swizzled(rank: int, row_bytes: int, bits: int) -> gl.NVMMASharedLayout:
    """The layout of boxes in shared memory, with rows of ``row_bytes``, that the TMA writes and products read."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(row_bytes, 128), element_bitwidth=bits, rank=rank)


def half_of(block: tuple[int, int, int]) -> tuple[int, int, int]:
    """The first half of the pixels in a block of images, rows and columns."""
    n, h, w = block
    return (n // 2, h, w) if n > 1 else (n, h // 2, w) if h > 1 else (n, h, w // 2)


def gluon_conv(
    xq: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    padding: tuple[int, int],
    out: torch.Tensor,
    tile: Tile,
    channel_add: torch.Tensor | None = None,
    stride: int = 1,
) -> None:
    """As ``conv.conv``, on a Hopper GPU: convolve ``xq`` [N, H, W, C] with ``weight`` [K, kernel_h, kernel_w, C], both
    contiguous and of one 8-bit dtype, into ``out`` [N, H_out, W_out, K].

    ``tile``: of 128 or 256 rows, at least 64 columns, a depth of 64 or 128, eight warps and no splits. With a
    ``stride`` of 2, C must be a multiple of the depth. Raises ValueError for other tiles.
    """
    N, H, W, C = xq.shape
    K, kernel_h, kernel_w, _ = weight.shape
    _, H_out, W_out, _ = out.shape
    if tile.splits != 1 or tile.warps != _PARTS * _WARPS or (stride == 2 and C % tile.depth):
        raise ValueError(f"no such tile for this convolution: {tile}")
    block = pixel_block(tile.rows, N, H_out, W_out)
    n, h, w = block
    taps = kernel_h * kernel_w
    blocks = triton.cdiv(N, n) * triton.cdiv(H_out, h) * triton.cdiv(W_out, w) * triton.cdiv(K, tile.columns)
    if stride == 1:
        view, box = xq, [n, h, w, tile.depth]
    else:
        view, box = xq.view(N, H // 2, 2, W // 2, 2 * C), [n, h, 1, w, tile.depth]
    out_boxes = None
    if out.element_size() == 2 and K % 8 == 0 and out.data_ptr() % 16 == 0:  # else the TMA cannot store it
        out_boxes = TensorDescriptor.from_tensor(out, [*half_of(block), _CHUNK], swizzled(4, 2 * _CHUNK, 16))
    launch(_gluon_conv_kernel, min(blocks, processors(xq.device)))(
        TensorDescriptor.from_tensor(view, box, swizzled(len(box), tile.depth, 8)),
        TensorDescriptor.from_tensor(weight.view(K, taps * C), [tile.columns, tile.depth], swizzled(2, tile.depth, 8)),
        out_boxes,
        out,
        scale,
        weight_scale,
        bias,
        channel_add,
        min(weight_scale.numel() - 1, 1),
        0 if channel_add is None else channel_add.stride(0),
        N,
        H_out,
        W_out,
        C,
        K,
        *padding,
        blocks,
        KERNEL_W=kernel_w,
        TAPS=taps,
        BLOCK=block,
        STAGES=tile.stages,
        STRIDE=stride,
        PARTS=_PARTS,
        num_warps=_WARPS,
    )
