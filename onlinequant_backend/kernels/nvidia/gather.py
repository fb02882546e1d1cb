"""8-bit convolution of any geometry, and linear layer, as an implicit GEMM that fetches its operands by plain pointers.

For what ``conv`` and ``matmul`` leave: strides, dilation, 3-d kernels, channel counts that are no multiple of 16, and
devices without a tensor memory accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .conv import add_up, new_parts, store_part
from .epilogue import finish
from .launch import launch
from .tuning import Tile


@triton.jit
def _gather_kernel(
    x,
    w,
    out,
    scale,
    weight_scale,
    bias,
    residual,
    channel_add,
    weight_stride,
    channel_stride,
    M,
    D,
    H,
    W,
    C,
    K,
    D_out,
    H_out,
    W_out,
    stride_d,
    stride_h,
    stride_w,
    padding_d,
    padding_h,
    padding_w,
    dilation_d,
    dilation_h,
    dilation_w,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """X [N, D, H, W, C], w [K, KERNEL_D, KERNEL_H, KERNEL_W, C], out and residual [N, D_out, H_out, W_out, K] of M
    pixels, weight_scale and bias [K], channel_add [N, K]. With SPLITS > 1, out is [SPLITS, M, K] and takes the bare
    sums."""
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    tiles = tl.cdiv(M, BLOCK_M)
    blocks_k = tl.cdiv(K, BLOCK_K)
    # A group of pixel tiles runs through all output channels together: they share the weights in the L2 cache.
    pid = tl.program_id(0)
    group = pid // (GROUP * blocks_k)
    members = min(tiles - group * GROUP, GROUP)
    within = pid % (GROUP * blocks_k)
    rows = (group * GROUP + within % members) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = within // members * BLOCK_K
    valid = rows < M
    n = rows // (D_out * H_out * W_out)
    # The input pixel under the first tap, which may lie outside; so may the address.
    z0 = rows // (H_out * W_out) % D_out * stride_d - padding_d
    y0 = rows // W_out % H_out * stride_h - padding_h
    x0 = rows % W_out * stride_w - padding_w
    c = tl.arange(0, BLOCK_C)
    x_block = x + (((n.to(tl.int64) * D + z0) * H + y0) * W + x0)[:, None] * C + c[None, :]
    k = k0 + tl.arange(0, BLOCK_K)
    w_block = w + k.to(tl.int64)[:, None] * (TAPS * C) + c[None, :]

    if x.dtype.element_ty == tl.int8:
        accumulator = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    else:
        accumulator = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    steps = tl.cdiv(C, BLOCK_C)
    split = tl.program_id(1)
    for i in range(TAPS * steps * split // SPLITS, TAPS * steps * (split + 1) // SPLITS):
        tap = i // steps
        c0 = i % steps * BLOCK_C
        dz = tap // (KERNEL_H * KERNEL_W) * dilation_d
        dy = tap // KERNEL_W % KERNEL_H * dilation_h
        dx = tap % KERNEL_W * dilation_w
        inside = valid & (z0 + dz >= 0) & (z0 + dz < D) & (y0 + dy >= 0) & (y0 + dy < H)
        inside = inside & (x0 + dx >= 0) & (x0 + dx < W)
        channels = (c0 + c < C)[None, :]
        shift = ((dz.to(tl.int64) * H + dy) * W + dx) * C + c0
        a = tl.load(x_block + shift, mask=inside[:, None] & channels, other=0.0)
        b = tl.load(w_block + (tap * C + c0), mask=(k < K)[:, None] & channels, other=0.0)
        accumulator = tl.dot(a, b.T, accumulator, out_dtype=accumulator.dtype)

    if SPLITS == 1:
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
        store_part(accumulator, out, rows, valid, k0, K, split, M)


def gather_conv(
    xq: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: torch.Tensor,
    tile: Tile,
    residual: torch.Tensor | None = None,
    channel_add: torch.Tensor | None = None,
) -> None:
    """Convolve ``xq`` [N, *spatial, C] with ``weight`` [K, *kernel, C], both contiguous and of one 8-bit dtype, into
    ``out`` [N, *spatial_out, K]. Of three, two or (a linear layer) no spatial dimensions.

    ``scale``: float32 of one element, the input's. ``weight_scale``: float32 [K] or [1]. ``residual``: added, like
    ``out``. ``channel_add`` [N, K], of contiguous rows: added to every pixel of its image. ``tile.depth`` must be at
    least 32.
    """
    missing = 5 - xq.dim()
    ones, zeros = (1,) * missing, (0,) * missing
    K = out.shape[-1]
    M = out.numel() // K
    parts = None if tile.splits == 1 else new_parts(xq, out, tile.splits)
    kernel_d, kernel_h, kernel_w = (*ones, *weight.shape[1:-1])
    launch(_gather_kernel, triton.cdiv(M, tile.rows) * triton.cdiv(K, tile.columns), tile.splits)(
        xq,
        weight,
        out if parts is None else parts,
        scale,
        weight_scale,
        bias,
        residual,
        channel_add,
        min(weight_scale.numel() - 1, 1),
        0 if channel_add is None else channel_add.stride(0),
        M,
        *ones,
        *xq.shape[1:],
        K,
        *ones,
        *out.shape[1:-1],
        *ones,
        *stride,
        *zeros,
        *padding,
        *ones,
        *dilation,
        KERNEL_D=kernel_d,
        KERNEL_H=kernel_h,
        KERNEL_W=kernel_w,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_C=tile.depth,
        GROUP=8,
        SPLITS=tile.splits,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts is not None:
        add_up(parts, scale, weight_scale, bias, out, residual, channel_add)
