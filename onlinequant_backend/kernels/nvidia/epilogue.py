"""What becomes of a block of sums of 8-bit products: scaled, biased, added to, perhaps quantized again, and stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Kernels are compiled for NVIDIA's GPUs, not run by Triton's interpreter.
PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)


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
    channel_stride=0,
):
    """Store ``accumulator`` [M, BLOCK_K] into columns ``k0``... of ``out`` [*, K], at ``rows`` [M] where ``valid``.

    ``scale`` points at one number, ``weight_scale`` at K (or at one, with a ``weight_stride`` of 0), ``bias`` at K,
    ``residual`` at the like of ``out``, ``channel_add`` at a row of K for each of ``images`` [M], ``channel_stride``
    apart (or at the row of all, with None), ``out_qparams`` at 1 / scale of an 8-bit ``out``. All but the scales may be
    None.
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
        y += tl.load(channel_add + images[:, None] * channel_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    store(y, out, places, mask, out_qparams)


@triton.jit
def store(y, out, places, mask, out_qparams):
    """Store float32 ``y``, quantized first if there are ``out_qparams``."""
    if out_qparams is not None:
        y *= tl.load(out_qparams)
    tl.store(out + places, rounded(y, out.dtype.element_ty), mask=mask)


@triton.jit
def rounded(y, dtype: tl.constexpr):
    """float32 ``y`` as ``dtype``: the nearest number that has, at most its largest if it is of 8 bit, in which NaN and
    infinity become ``formats.NOT_FINITE``."""
    if dtype == tl.int8:
        y = tl.where(tl.abs(y) < float("inf"), tl.floor(tl.clamp(y, -127.0, 127.0) + 0.5), -128.0)
    elif dtype == tl.float8e4nv:
        y = tl.where(tl.abs(y) < float("inf"), y, float("nan"))
        if not PTX:  # PTX's conversion saturates
            y = tl.clamp(y, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return y.to(dtype)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """X times the normal distribution's CDF at x; for a GPU within 3e-5 unless EXACT, which 8 or 16 bits do not show.

    There it is max(x, 0) - |x| / 2 * erfc(|x| / sqrt(2)), where erfc is equation 7.1.25 of Abramowitz and Stegun,
    "Handbook of Mathematical Functions" (1964). The exact one takes twice as long, and most of a short product's time.
    """
    if EXACT or not PTX:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return tl.inline_asm_elementwise(
        """
        {
            .reg .f32 size, t, p, e;
            abs.f32 size, $1;
            fma.rn.ftz.f32 t, size, 0f3EAA540E, 0f3F800000;  // 0.47047 / sqrt(2), 1
            rcp.approx.ftz.f32 t, t;
            fma.rn.ftz.f32 p, t, 0f3EBF7377, 0fBD445CA1;  // 0.7478556 / 2, -0.0958798 / 2
            fma.rn.ftz.f32 p, p, t, 0f3E32303A;  // 0.3480242 / 2
            mul.ftz.f32 p, p, t;
            mul.ftz.f32 e, $1, 0fBF38AA3B;  // -log2(e) / 2
            mul.ftz.f32 e, e, $1;
            ex2.approx.ftz.f32 e, e;
            mul.ftz.f32 p, p, e;
            max.NaN.f32 t, $1, 0f00000000;
            mul.ftz.f32 p, p, size;
            sub.ftz.f32 $0, t, p;
        }
        """,
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def silu(y):
    """Y * sigmoid(y), in ``PTX`` for a GPU: without what keeps subnormal numbers exact, half as many instructions."""
    if not PTX:
        return y / (1.0 + tl.exp(-y))
    return tl.inline_asm_elementwise(
        """
        {
            .reg .f32 t;
            mul.ftz.f32 t, $1, 0fBFB8AA3B;  // -log2(e)
            ex2.approx.ftz.f32 t, t;
            add.ftz.f32 t, t, 0f3F800000;  // 1
            rcp.approx.ftz.f32 t, t;
            mul.ftz.f32 $0, $1, t;
        }
        """,
        "=f,f",
        [y],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
