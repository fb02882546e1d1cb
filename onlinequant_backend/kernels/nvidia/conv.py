"""8-bit 2-d convolution of stride 1 or 2 as an implicit GEMM, its operands fetched by the tensor memory accelerator.

The input is [N, H, W, C] in memory. For each tap of the kernel, a block of output pixels needs a block of input pixels
that is shifted by a few rows and columns: one box of a 4-d tensor descriptor, which reads zero outside of the image,
also at negative coordinates. So there is no padding and no im2col in memory. A temporal (3, 1, 1) convolution
over [N, T, H, W, C] is the same with T as the rows and H * W as the columns.

With a stride of 2 the input is read as [N, H / 2, 2, W / 2, 2 C], pairs of rows and pairs of columns: every tap then
needs the same one of each pair for all output pixels, which is again a box.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .epilogue import finish
from .launch import launch
from .tuning import Tile


@triton.jit
def _conv_kernel(
    x_descriptor,
    w_descriptor,
    out,
    scale,
    weight_scale,
    bias,
    residual,
    channel_add,
    weight_stride,
    channel_stride,
    H_out,
    W_out,
    C,
    K,
    padding_h,
    padding_w,
    N,
    KERNEL_W: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """X [N, H, W, C], or as pairs with a STRIDE of 2, w [K, TAPS * C], out and residual [N, H_out, W_out, K],
    weight_scale and bias [K], channel_add [N, K]. With SPLITS > 1, out is [SPLITS, N, H_out, W_out, K] and takes the
    bare sums."""
    BLOCK_M: tl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    tiles_h = tl.cdiv(H_out, BLOCK_H)
    tiles_w = tl.cdiv(W_out, BLOCK_W)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_h * tiles_w
    blocks_k = tl.cdiv(K, BLOCK_K)
    # A group of pixel tiles runs through all output channels together: they share the weights in the L2 cache.
    pid = tl.program_id(0)
    group = pid // (GROUP * blocks_k)
    members = min(tiles - group * GROUP, GROUP)
    within = pid % (GROUP * blocks_k)
    tile = group * GROUP + within % members
    k0 = within // members * BLOCK_K
    w0 = tile % tiles_w * BLOCK_W
    h0 = tile // tiles_w % tiles_h * BLOCK_H
    n0 = tile // (tiles_w * tiles_h) * BLOCK_N

    if x_descriptor.dtype == tl.int8:
        accumulator = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    else:
        accumulator = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    steps = tl.cdiv(C, BLOCK_C)
    split = tl.program_id(1)
    for i in range(TAPS * steps * split // SPLITS, TAPS * steps * (split + 1) // SPLITS):
        tap = i // steps
        c = i % steps * BLOCK_C
        h = tap // KERNEL_W - padding_h
        w = tap % KERNEL_W - padding_w
        if STRIDE == 1:
            box = x_descriptor.load([n0, h0 + h, w0 + w, c])
        else:
            box = x_descriptor.load([n0, h0 + (h >> 1), h & 1, w0 + (w >> 1), (w & 1) * C + c])
        a = box.reshape(BLOCK_M, BLOCK_C)
        # Beyond C the weights are the next tap's, but the pixels are zero there.
        b = w_descriptor.load([k0, tap * C + c])
        accumulator = tl.dot(a, b.T, accumulator, out_dtype=accumulator.dtype)

    m = tl.arange(0, BLOCK_M)
    n = n0 + m // (BLOCK_H * BLOCK_W)
    h = h0 + m // BLOCK_W % BLOCK_H
    w = w0 + m % BLOCK_W
    rows = (n * H_out + h) * W_out + w
    valid = (n < N) & (h < H_out) & (w < W_out)
    if SPLITS == 1 and BLOCK_N == 1 and channel_add is not None:
        # All pixels are of one image: one row instead of a row for each pixel.
        finish(
            accumulator,
            out,
            rows,
            valid,
            k0,
            K,
            scale,
            weight_scale,
            bias,
            residual,
            channel_add + n0 * channel_stride,
            None,
            None,
            weight_stride,
            channel_stride,
        )
    elif SPLITS == 1:
        finish(
            accumulator,
            out,
            rows,
            valid,
            k0,
            K,
            scale,
            weight_scale,
            bias,
            residual,
            channel_add,
            n,
            None,
            weight_stride,
            channel_stride,
        )
    else:
        store_part(accumulator, out, rows, valid, k0, K, split, N * H_out * W_out)


@triton.jit
def store_part(accumulator, parts, rows, valid, k0, K, split, M):
    """Store ``accumulator`` as it is into ``parts`` [SPLITS, M, K], for ``add_up``."""
    k = k0 + tl.arange(0, accumulator.shape[1])
    places = (split.to(tl.int64) * M + rows)[:, None] * K + k[None, :]
    tl.store(parts + places, accumulator, mask=valid[:, None] & (k < K)[None, :])


@triton.jit
def _add_up_kernel(
    parts,
    out,
    scale,
    weight_scale,
    bias,
    residual,
    channel_add,
    weight_stride,
    channel_stride,
    M,
    K,
    pixels,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Parts [SPLITS, M, K], out and residual [M, K]; an image has ``pixels`` rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    places = rows.to(tl.int64)[:, None] * K + k[None, :]
    mask = (rows < M)[:, None] & (k < K)[None, :]
    accumulator = tl.load(parts + places, mask=mask, other=0)
    for split in tl.static_range(1, SPLITS):
        accumulator += tl.load(parts + places + tl.full((), split, tl.int64) * M * K, mask=mask, other=0)
    images = rows // pixels
    finish(
        accumulator,
        out,
        rows,
        rows < M,
        k0,
        K,
        scale,
        weight_scale,
        bias,
        residual,
        channel_add,
        images,
        None,
        weight_stride,
        channel_stride,
    )


def new_parts(xq: torch.Tensor, out: torch.Tensor, splits: int) -> torch.Tensor:
    """Room for the sums of ``splits`` programs for each block of ``out``."""
    return out.new_empty((splits, *out.shape), dtype=torch.int32 if xq.dtype == torch.int8 else torch.float32)


def add_up(
    parts: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    channel_add: torch.Tensor | None,
) -> None:
    """Add up ``parts`` [splits, N, ..., K], always in one order, and finish ``out`` as ``conv`` does."""
    splits, N, *_, K = parts.shape
    M = out.numel() // K
    launch(_add_up_kernel, triton.cdiv(M, 16), triton.cdiv(K, 64))(
        parts,
        out,
        scale,
        weight_scale,
        bias,
        residual,
        channel_add,
        min(weight_scale.numel() - 1, 1),
        0 if channel_add is None else channel_add.stride(0),
        M,
        K,
        M // N,
        SPLITS=splits,
        BLOCK_M=16,
        BLOCK_K=64,
        num_warps=4,
    )


def conv(
    xq: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    padding: tuple[int, int],
    out: torch.Tensor,
    tile: Tile,
    residual: torch.Tensor | None = None,
    channel_add: torch.Tensor | None = None,
    stride: int = 1,
) -> None:
    """Convolve ``xq`` [N, H, W, C] with ``weight`` [K, kernel_h, kernel_w, C], both contiguous and of one 8-bit dtype,
    into ``out`` [N, H_out, W_out, K].

    ``scale``: float32 of one element, the input's. ``weight_scale``: float32 [K] or [1]. ``residual``: added, like
    ``out``. ``channel_add`` [N, K], of contiguous rows: added to every pixel of its image. C must be a multiple of 16.
    With a ``stride`` of 2, of ``tile.depth``, and rows and columns must be even in number.
    """
    N, H, W, C = xq.shape
    K, kernel_h, kernel_w, _ = weight.shape
    _, H_out, W_out, _ = out.shape
    n, h, w = pixel_block(tile.rows, N, H_out, W_out)
    taps = kernel_h * kernel_w
    blocks = triton.cdiv(N, n) * triton.cdiv(H_out, h) * triton.cdiv(W_out, w) * triton.cdiv(K, tile.columns)
    parts = None if tile.splits == 1 else new_parts(xq, out, tile.splits)
    if stride == 1:
        boxes = TensorDescriptor.from_tensor(xq, [n, h, w, tile.depth])
    else:
        boxes = TensorDescriptor.from_tensor(xq.view(N, H // 2, 2, W // 2, 2 * C), [n, h, 1, w, tile.depth])
    launch(_conv_kernel, blocks, tile.splits)(
        boxes,
        TensorDescriptor.from_tensor(weight.view(K, taps * C), [tile.columns, tile.depth]),
        out if parts is None else parts,
        scale,
        weight_scale,
        bias,
        residual,
        channel_add,
        min(weight_scale.numel() - 1, 1),
        0 if channel_add is None else channel_add.stride(0),
        H_out,
        W_out,
        C,
        K,
        padding[0],
        padding[1],
        N,
        KERNEL_W=kernel_w,
        TAPS=taps,
        BLOCK_N=n,
        BLOCK_H=h,
        BLOCK_W=w,
        BLOCK_K=tile.columns,
        BLOCK_C=tile.depth,
        GROUP=8,
        SPLITS=tile.splits,
        STRIDE=stride,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts is not None:
        add_up(parts, scale, weight_scale, bias, out, residual, channel_add)


def pixel_block(pixels: int, N: int, H: int, W: int) -> tuple[int, int, int]:
    """How ``pixels`` output pixels of a block are spread over images, rows and columns: with the least waste, and
    then as square as possible, since neighbours share what they read."""
    blocks = []
    for log_n in range(pixels.bit_length()):
        for log_h in range(pixels.bit_length() - log_n):
            n, h = 2**log_n, 2**log_h
            w = pixels // (n * h)
            if w <= 256 and h <= 256 and n <= 256:
                covered = triton.cdiv(N, n) * n * triton.cdiv(H, h) * h * triton.cdiv(W, w) * w
                blocks.append((covered, n, abs(log_h - w.bit_length() + 1), (n, h, w)))
    return min(blocks)[3]
