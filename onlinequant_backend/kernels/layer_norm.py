"""Residual add, LayerNorm and quantization of the result, in one kernel: every value is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .epilogue import store


@triton.jit
def _layer_norm_kernel(
    x,
    residual,
    total,
    weight,
    bias,
    qparams,
    out,
    C,
    eps,
    BLOCK_C: tl.constexpr,
):
    """One row a program. x, residual, total and out [rows, C], weight and bias [C]."""
    places = tl.program_id(0).to(tl.int64) * C + tl.arange(0, BLOCK_C)
    c = tl.arange(0, BLOCK_C)
    mask = c < C
    values = tl.load(x + places, mask=mask, other=0.0)
    if residual is not None:
        # Rounded as the sum is that others read.
        values = (values.to(tl.float32) + tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)).to(
            total.dtype.element_ty
        )
        tl.store(total + places, values, mask=mask)
    values = values.to(tl.float32)
    mean = tl.sum(values, 0) / C
    centred = tl.where(mask, values - mean, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    if weight is not None:
        y *= tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
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
    """Quantize the LayerNorm of ``x`` + ``residual``, both [rows, C] and contiguous, into 8-bit ``out``; the sum goes
    into ``total``. C is at most 16384: a row is kept in registers."""
    rows, C = x.shape
    block = triton.next_power_of_2(C)
    warps = min(max(block // 512, 1), 8)
    _layer_norm_kernel[(rows,)](x, residual, total, weight, bias, qparams, out, C, eps, BLOCK_C=block, num_warps=warps)
