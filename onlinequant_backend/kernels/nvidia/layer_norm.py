"""Residual add, LayerNorm and quantization of the result, in one kernel: every value is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .epilogue import store
from .launch import launch


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sum_of(x, residual, places, mask, dtype: tl.constexpr):
    """X + residual as float32, rounded as the sum is that others read."""
    values = tl.load(x + places, mask=mask, other=0.0)
    if residual is not None:
        values = (values.to(tl.float32) + tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    return values


@triton.jit
def _layer_norm_kernel(
    x,
    residual,
    total,
    weight,
    bias,
    qparams,
    out,
    M,
    C,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x, residual, total and out [M, C], weight and bias [C]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    places = row[:, None] * C + c[None, :]
    mask = (row < M)[:, None] & (c < C)[None, :]
    values = _sum_of(x, residual, places, mask, x.dtype.element_ty)
    if residual is not None:
        tl.store(total + places, values, mask=mask)
    # Both sums at once, of distances from the first value, so that a mean far from zero costs no precision.
    first = _sum_of(x, residual, row * C, row < M, x.dtype.element_ty).to(tl.float32)
    distances = tl.where(mask, values.to(tl.float32) - first[:, None], 0.0)
    mean, squares = tl.reduce((distances, distances * distances), 1, _add_both)
    mean /= C
    variance = tl.maximum(squares / C - mean * mean, 0.0)
    y = (distances - mean[:, None]) * tl.rsqrt(variance + eps)[:, None]
    if weight is not None:
        y *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    store(y, out, places, mask, qparams)


def layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    total: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    qparams: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Quantize the LayerNorm of ``x`` + ``residual``, both [M, C] and contiguous, into 8-bit ``out``; the sum goes
    into ``total``. C is at most 16384: a row is kept in registers."""
    M, C = x.shape
    block = triton.next_power_of_2(C)
    rows = max(2048 // block, 1)  # of short ones a warp takes several: fewer programs, none waits for another warp
    warps = min(block // 256, 8) if block > 1024 else 1
    launch(_layer_norm_kernel, triton.cdiv(M, rows))(
        *(x, residual, total, weight, bias, qparams, out, M, C, eps), ROWS=rows, BLOCK_C=block, num_warps=warps
    )
