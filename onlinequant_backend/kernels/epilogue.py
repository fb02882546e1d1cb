"""What becomes of a block of sums of 8-bit products: scaled, biased, added to, perhaps quantized again, and stored."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(
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
    images,
    out_qparams,
    weight_stride=1,
):
    """Store ``accumulator`` [M, BLOCK_K] into columns ``k0``... of ``out`` [*, K], at ``rows`` [M] where ``valid``.

    ``scale`` points at one number, ``weight_scale`` at K (or at one, with a ``weight_stride`` of 0), ``bias`` at K,
    ``residual`` at the like of ``out``, ``channel_add`` at a row of K for each of ``images`` [M] (or at the row of
    all, with None), ``out_qparams`` at
    1 / scale of an 8-bit ``out``. All but the scales may be None.
    """
    BLOCK_K: tl.constexpr = accumulator.shape[1]
    k = k0 + tl.arange(0, BLOCK_K)
    inside = k < K
    factors = tl.load(scale) * tl.load(weight_scale + k * weight_stride, mask=inside, other=0.0)
    y = accumulator.to(tl.float32) * factors[None, :]
    if bias is not None:
        y += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None] * K + k[None, :]
    mask = valid[:, None] & inside[None, :]
    if channel_add is not None and images is None:
        y += tl.load(channel_add + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    elif channel_add is not None:
        y += tl.load(channel_add + images[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    store(y, out, places, mask, out_qparams)


@triton.jit
def store(y, out, places, mask, out_qparams):
    """Store float32 ``y``, quantized first if there are ``out_qparams``."""
    if out_qparams is not None:
        limit: tl.constexpr = 127.0 if out.dtype.element_ty == tl.int8 else 448.0
        y = tl.clamp(y * tl.load(out_qparams), -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        if out.dtype.element_ty == tl.int8:
            y = tl.floor(y + 0.5)
    tl.store(out + places, y.to(out.dtype.element_ty), mask=mask)
