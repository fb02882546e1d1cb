"""The softmax of ``gluon_attention``: float8 weights of float16 scores, without the exponential function.

Scores stay in float16 as the tensor cores give them, two in a register, and of the exponential function it only takes
that an 8-bit float's bits, as an integer, are nearly the logarithm of its value (Schraudolph, "A fast, compact
approximation of the exponential function", 1999): the bits of a weight are its exponent times 8, rounded, plus a
constant. Between powers of two, where they are off by up to 6%, the format itself is by 3%. The tensor cores add the
weights up, too, as they are after rounding, so that nothing of it changes what the weights of a query come to.
"""

# Gluon compiles no early returns.
# ruff: noqa: RET505

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.constexpr_function
def product(columns):
    """The layout of a product with so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32])


@gluon.constexpr_function
def left(columns):
    """The layout of the left operand of such a product, in registers."""
    return gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32]), 4)


@gluon.jit
def _halves(x):
    """The left and the right columns of ``x``, with no data moved between threads."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()


@gluon.jit
def _larger(x, y):
    """The maximum of float16 values, two at a time."""
    return gl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _smaller(x, y):
    """The minimum of float16 values, two at a time."""
    return gl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _row_max(s):
    """The largest of each row of float16 values, whose columns are folded as long as a thread has both."""
    if s.shape[1] > 8:
        left, right = _halves(s)
        return _row_max(_larger(left, right))
    else:
        return gl.max(s, 1)


@gluon.jit
def _weights_in_16_bit(s, factor, summand):
    """The bits of float8 weights as integers, 128 * (``s`` * ``factor`` + ``summand``) rounded, from 0 on.

    A product with 2^-17 is so small that its bits are an integer.
    """
    return gl.inline_asm_elementwise(
        """
        {
            .reg .b32 a, tiny;
            mov.b32 tiny, 0x00800080;
            fma.rn.sat.f16x2 a, $1, $2, $3;
            mul.rn.f16x2 $0, a, tiny;
        }
        """,
        "=r,r,r,r",
        [s, factor, summand],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def packed(weights):
    """What ``weights_of`` gave in 8 bit. Of each four integers that a thread gets for its four weights the first has
    the bits of all: four single bytes would be taken apart, and put together, where a loop's next round begins.

    ``as_weights`` makes float8 of them.
    """
    return gl.inline_asm_elementwise(
        """
        prmt.b32 $0, $4, $5, 0x6420;
        mov.b32 $1, 0;
        mov.b32 $2, 0;
        mov.b32 $3, 0;
        """,
        "=r,=r,=r,=r,r,r",
        [weights],
        dtype=gl.int32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def as_weights(bits):
    """Float8 weights, of what ``packed`` gave."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [bits], dtype=gl.float8e4nv, is_pure=True, pack=4)


@gluon.jit
def weights_of(s, largest, factor, start, tokens, D: gl.constexpr, IS_LAST: gl.constexpr):
    """Weights of a block of scores, the left operand of a product with values, relative to the ``largest`` exponent so
    far, a whole number; that, and by what weights before shrink. ``factor``: from scores to exponents."""
    BLOCK: gl.constexpr = s.shape[1]
    layout: gl.constexpr = s.type.layout
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    operand: gl.constexpr = left(D)
    # An exponent's 16 powers of two are all that fp8 has: from 0 to 1 for the bits, in the middle of which is 1.
    UNIT: gl.constexpr = 1 / 16
    TOP: gl.constexpr = 15 / 16
    if IS_LAST:
        token = start + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
        s = _smaller(s, gl.where(token < tokens, float("inf"), float("-inf")).to(gl.float16)[None, :])
    slope = (factor * UNIT).to(gl.float16)
    top = _row_max(s)
    top = gl.convert_layout(top, rows).to(gl.float32)
    # A scale that is not a number makes all that follows none: weights have no bits for it.
    now = gl.maximum(largest, gl.ceil(top * (slope.to(gl.float32) * (1 / UNIT))), propagate_nan=_NAN)
    summand = (TOP - now * UNIT).to(gl.float16)
    # In the order of _order; registers change their names, and nothing moves.
    s = s.reshape([s.shape[0], BLOCK // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4).reshape([s.shape[0], BLOCK])
    s = gl.convert_layout(s, operand)
    slope = gl.convert_layout(slope, gl.SliceLayout(1, operand))[:, None]
    summand = gl.convert_layout(summand, gl.SliceLayout(1, operand))[:, None]
    return _weights_in_16_bit(s, slope, summand), now, gl.exp2(largest - now)
