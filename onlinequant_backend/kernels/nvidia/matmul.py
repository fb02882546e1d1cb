"""8-bit matrix product, its operands fetched by the tensor memory accelerator, with fused epilogues."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .epilogue import finish, gelu, rounded
from .launch import launch
from .tuning import Tile


@triton.jit
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Where this program's block begins; groups of row blocks run through the columns together (L2 cache)."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP * blocks_n)
    members = min(blocks_m - group * GROUP, GROUP)
    within = pid % (GROUP * blocks_n)
    return (group * GROUP + within % members) * BLOCK_M, within // members * BLOCK_N


@triton.jit
def _matmul_kernel(
    x_descriptor,
    w_descriptor,
    out,
    scale,
    weight_scale,
    weight_stride,
    bias,
    residual,
    out_qparams,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """X [M, K], w [N, K], out and residual [M, N], weight_scale [N] (or [1] with stride 0), bias [N]."""
    m0, n0 = _place(M, N, BLOCK_M, BLOCK_N, GROUP)
    if x_descriptor.dtype == tl.int8:
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    else:
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_descriptor.load([m0, k])
        accumulator = tl.dot(x, w_descriptor.load([n0, k]).T, accumulator, out_dtype=accumulator.dtype)
    rows = m0 + tl.arange(0, BLOCK_M)
    finish(
        accumulator,
        out,
        rows,
        rows < M,
        n0,
        N,
        scale,
        weight_scale,
        bias,
        residual,
        None,
        rows,
        out_qparams,
        weight_stride,
    )


@triton.jit
def _geglu_kernel(
    x_descriptor,
    w_descriptor,
    out,
    scale,
    weight_scale,
    weight_stride,
    bias,
    out_qparams,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """X [M, K], w [2 N, K], out [M, N]: (x @ w[:N].T) * gelu(x @ w[N:].T)."""
    m0, n0 = _place(M, N, BLOCK_M, BLOCK_N, GROUP)
    if x_descriptor.dtype == tl.int8:
        values = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        gates = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    else:
        values = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        gates = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_descriptor.load([m0, k])
        values = tl.dot(x, w_descriptor.load([n0, k]).T, values, out_dtype=values.dtype)
        gates = tl.dot(x, w_descriptor.load([N + n0, k]).T, gates, out_dtype=gates.dtype)
    rows = m0 + tl.arange(0, BLOCK_M)
    columns = n0 + tl.arange(0, BLOCK_N)
    inside = columns < N
    x_scale = tl.load(scale)
    value_scales = x_scale * tl.load(weight_scale + columns * weight_stride, mask=inside, other=0.0)
    gate_scales = x_scale * tl.load(weight_scale + (N + columns) * weight_stride, mask=inside, other=0.0)
    if out_qparams is not None:  # scales one factor of the product, which is scaled anyway
        out_scale = tl.load(out_qparams)
        value_scales *= out_scale
    value = values.to(tl.float32) * value_scales[None, :]
    gate = gates.to(tl.float32) * gate_scales[None, :]
    if bias is not None:
        value_bias = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        if out_qparams is not None:
            value_bias *= out_scale
        value += value_bias[None, :]
        gate += tl.load(bias + N + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = rounded(value * gelu(gate, out.dtype.element_ty == tl.float32), out.dtype.element_ty)
    mask = (rows < M)[:, None] & inside[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * N + columns[None, :], y, mask=mask)


def matmul(
    xq: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
    residual: torch.Tensor | None = None,
    out_qparams: torch.Tensor | None = None,
    geglu: bool = False,
) -> None:
    """Multiply ``xq`` [M, K] by the transpose of ``weight`` [N, K] (both contiguous, of one 8-bit dtype) into ``out``.

    ``scale``: float32 of one element, the input's. ``weight_scale``: float32 [N] or [1]. ``residual``: added, like
    ``out``. ``out_qparams``: of an 8-bit ``out``, see ``ops.quantize``. ``geglu``: ``out`` is [M, N / 2], the first
    half of the columns times GELU of the second (Shazeer, "GLU Variants Improve Transformer", 2020). K must be a
    multiple of 16.
    """
    M, K = xq.shape
    N = out.shape[1]
    operands = (
        TensorDescriptor.from_tensor(xq, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
        out,
        scale,
        weight_scale,
        min(weight_scale.numel() - 1, 1),
        bias,
    )
    blocks = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
    options = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "GROUP": 8}
    options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    if geglu:
        launch(_geglu_kernel, blocks)(*operands, out_qparams, M, N, K, **options)
    else:
        launch(_matmul_kernel, blocks)(*operands, residual, out_qparams, M, N, K, **options)
