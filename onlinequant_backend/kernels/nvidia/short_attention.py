"""Attention over short sequences, such as those over time: each program keeps several whole sequences in registers.

Reading and writing takes nearly all of the time, which 8-bit products would not shorten: products stay in float.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import launch

LONGEST = 64  # tokens


@triton.jit
def _places(sequence, token, d, heads, stride_b, stride_h, stride_n):
    """Of [SEQUENCES, tokens, D] values: sequences are the heads of all batch entries, one after the other."""
    head = (sequence // heads).to(tl.int64) * stride_b + (sequence % heads).to(tl.int64) * stride_h
    return head[:, None, None] + (token.to(tl.int64) * stride_n)[None, :, None] + d[None, None, :]


@triton.jit
def _short_attention_kernel(
    q,
    k,
    v,
    out,
    scale,
    sequences,
    heads,
    queries,
    tokens,
    size,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    SEQUENCES: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
):
    """Out [batch, queries, heads, size] of q, k and v as given; ``scale``: of the exponents to the base 2."""
    sequence = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    query, token, d = tl.arange(0, QUERIES), tl.arange(0, TOKENS), tl.arange(0, D)
    exists = (sequence < sequences)[:, None, None] & (d < size)[None, None, :]
    has_query = exists & (query < queries)[None, :, None]
    has_token = exists & (token < tokens)[None, :, None]
    x = tl.load(q + _places(sequence, query, d, heads, q_stride_b, q_stride_h, q_stride_n), mask=has_query, other=0.0)
    y = tl.load(k + _places(sequence, token, d, heads, k_stride_b, k_stride_h, k_stride_n), mask=has_token, other=0.0)
    z = tl.load(v + _places(sequence, token, d, heads, v_stride_b, v_stride_h, v_stride_n), mask=has_token, other=0.0)
    s = tl.dot(x, y.permute(0, 2, 1))
    s = tl.where((token < tokens)[None, None, :], s * scale, float("-inf"))
    p = tl.exp2(s - tl.max(s, 2)[:, :, None])
    total = tl.sum(p, 2)
    result = tl.dot(p.to(z.dtype), z) / total[:, :, None]
    places = _places(sequence, query, d, heads, queries * heads * size, size, heads * size)
    tl.store(out + places, result.to(out.dtype.element_ty), mask=has_query)


def short_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Write softmax(``scale`` * ``q`` k^T) v into ``out`` [batch, queries, heads, size], which is contiguous.

    ``q`` [batch, heads, queries, size], ``k`` and ``v`` [batch, heads, tokens, size]: float16 or bfloat16, any strides
    but the last, which is 1. There are from 1 to ``LONGEST`` queries and tokens; the size is at most 256.
    """
    batch, heads, queries, size = q.shape
    tokens = k.shape[2]
    rows, columns, D = (max(triton.next_power_of_2(number), 16) for number in (queries, tokens, size))
    # A warp has a short sequence to itself, so that nothing waits for another warp.
    values = max(rows, columns) * D
    each = max(8192 // values, 1)
    launch(_short_attention_kernel, triton.cdiv(batch * heads, each))(
        *(q, k, v, out, scale * math.log2(math.e), batch * heads, heads, queries, tokens, size),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        SEQUENCES=each,
        QUERIES=rows,
        TOKENS=columns,
        D=D,
        num_warps=8 if values > 8192 else 4,
    )
