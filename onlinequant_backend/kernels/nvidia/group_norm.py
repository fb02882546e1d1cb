"""GroupNorm, SiLU and quantization of the result, channels last.

Where a group of an image fits into a multiprocessor's registers, one kernel does everything: every value is read once
and written once. Elsewhere they are read twice: one kernel sums up parts of each image channel by channel, a tiny one
makes of that a factor and a summand for each channel, and one applies them. Inductor's own kernels for channels-last
tensors take several times as long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .epilogue import silu, store
from .group_norm_in_registers import fits_one_kernel, one_kernel
from .launch import launch, processors

# Elements of a block: a thread of four warps has four loads of 16 bytes of 16-bit numbers under way.
_BLOCK = 4096
_WARPS = 4
# Of a block: a line of memory of 16-bit numbers at least, and not so many that most of the last block is empty.
_MIN_CHANNELS, _MAX_CHANNELS = 64, 256
# Programs that sum up, for each multiprocessor: what fits there at once.
_PROGRAMS = 4


@triton.jit
def _sum_kernel(
    x,
    sums,
    P,
    C,
    blocks,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean, and sum of squared distances from it, of every channel of ``blocks`` * BLOCK_P pixels.

    x [N, P, C], sums [N, chunks, 2, C]; the grid is channel blocks, chunks, N.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    chunk = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    inside = c < C
    row = tl.arange(0, BLOCK_P)
    first = chunk * blocks * BLOCK_P
    pixels = tl.minimum(P - first, blocks * BLOCK_P)
    x += (n * P + first) * C
    # Each place of the block on its own at first (Welford, "Note on a Method for Calculating Corrected Sums of Squares
    # and Products", 1962), so that a mean far from zero costs no precision.
    mean = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for i in range(blocks):
        mask = (row < pixels - i * BLOCK_P)[:, None] & inside[None, :]
        value = tl.load(x + (row[:, None] * C + c[None, :]), mask=mask, other=0.0).to(tl.float32)
        distance = tl.where(mask, value - mean, 0.0)
        mean += distance * (1.0 / (i + 1))
        squares += distance * (value - mean)
        x += BLOCK_P * C
    # How many pixels each place saw, then all of them as one (Chan et al., "Updating Formulae and a Pairwise Algorithm
    # for Computing Sample Variances", 1979).
    seen = tl.maximum((pixels - row + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[:, None]
    total = tl.sum(mean * (seen / pixels), 0)
    apart = mean - total[None, :]
    squares = tl.sum(squares + seen * apart * apart, 0)
    sums += ((n * tl.num_programs(1) + chunk) * 2) * C
    tl.store(sums + c, total, mask=inside)
    tl.store(sums + C + c, squares, mask=inside)


@triton.jit
def _combine_kernel(
    sums,
    weight,
    bias,
    factors,
    P,
    C,
    chunks,
    chunk_pixels,
    eps,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What to multiply the SIZE channels of a group with and what to add to them; factors [N, 2, C].

    sums [N, chunks, 2, C] of ``chunk_pixels`` each, but for the last chunk; the grid is groups, N.
    """
    i = tl.arange(0, BLOCK_C)
    c = tl.program_id(0) * SIZE + i
    n = tl.program_id(1).to(tl.int64)
    sums += n * chunks * 2 * C
    mean = 0.0
    for k0 in range(0, chunks, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = (k < chunks)[:, None] & (i < SIZE)[None, :]
        share = tl.minimum(P - k * chunk_pixels, chunk_pixels).to(tl.float32) / P / SIZE
        means = tl.load(sums + k[:, None] * 2 * C + c[None, :], mask=mask, other=0.0)
        mean += tl.sum(tl.sum(means * share[:, None], 1), 0)
    variance = 0.0
    for k0 in range(0, chunks, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = (k < chunks)[:, None] & (i < SIZE)[None, :]
        share = tl.minimum(P - k * chunk_pixels, chunk_pixels).to(tl.float32) / P / SIZE
        places = sums + k[:, None] * 2 * C + c[None, :]
        apart = tl.where(mask, tl.load(places, mask=mask, other=0.0) - mean, 0.0)
        squares = tl.load(places + C, mask=mask, other=0.0) / P / SIZE
        variance += tl.sum(tl.sum(squares + share[:, None] * apart * apart, 1), 0)
    factor = tl.zeros((BLOCK_C,), dtype=tl.float32) + tl.rsqrt(variance + eps)
    if weight is not None:
        factor *= tl.load(weight + c, mask=i < SIZE, other=0.0).to(tl.float32)
    summand = -mean * factor
    if bias is not None:
        summand += tl.load(bias + c, mask=i < SIZE, other=0.0).to(tl.float32)
    factors += n * 2 * C
    tl.store(factors + c, factor, mask=i < SIZE)
    tl.store(factors + C + c, summand, mask=i < SIZE)


@triton.jit
def _apply_kernel(
    x,
    factors,
    qparams,
    out,
    P,
    C,
    channel_blocks,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """X and out [N, P, C], factors [N, 2, C]; the grid is pixel blocks * channel blocks, N."""
    pid = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    c = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = (pid // channel_blocks) * BLOCK_P
    row = tl.arange(0, BLOCK_P)
    inside = c < C
    mask = (row < P - first)[:, None] & inside[None, :]
    places = row[:, None] * C + c[None, :]
    start = (n * P + first) * C
    y = tl.load(x + start + places, mask=mask, other=0.0).to(tl.float32)
    factors += n * 2 * C
    factor = tl.load(factors + c, mask=inside, other=0.0)
    summand = tl.load(factors + C + c, mask=inside, other=0.0)
    y = y * factor[None, :] + summand[None, :]
    if SILU:
        y = silu(y)
    store(y, out + start, places, mask, qparams)


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    qparams: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Quantize the GroupNorm of ``x``, and SiLU of that, into 8-bit ``out``; both [N, P, C] and contiguous.

    ``qparams``: see ``ops.quantize``.
    """
    run = one_kernel if fits_one_kernel(x.shape, groups, processors(x.device)) else three_kernels
    run(x, groups, weight, bias, eps, silu, qparams, out)


def three_kernels(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    qparams: torch.Tensor,
    out: torch.Tensor,
    programs: int | None = None,
) -> None:
    """``group_norm`` of any size. ``programs``: about how many sum up; all that the GPU has room for, if None."""
    N, P, C = x.shape
    block_c = _channels_of_a_block(C)
    block_p = _BLOCK // block_c
    channel_blocks, pixel_blocks = triton.cdiv(C, block_c), triton.cdiv(P, block_p)
    # Not more: few that wait for all others to end would take as long again.
    wanted = max((programs or _PROGRAMS * processors(x.device)) // (channel_blocks * N), 1)
    blocks = triton.cdiv(pixel_blocks, min(wanted, pixel_blocks))  # of a chunk
    chunks = triton.cdiv(pixel_blocks, blocks)
    sums = torch.empty((N, chunks, 2, C), dtype=torch.float32, device=x.device)
    factors = torch.empty((N, 2, C), dtype=torch.float32, device=x.device)
    tile = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": _WARPS}
    launch(_sum_kernel, channel_blocks, chunks, N)(x, sums, P, C, blocks, **tile)
    size = C // groups
    block_g = triton.next_power_of_2(size)
    block_k = min(triton.next_power_of_2(chunks), max(_BLOCK // block_g, 1))
    launch(_combine_kernel, groups, N)(
        sums, weight, bias, factors, P, C, chunks, blocks * block_p, eps, SIZE=size, BLOCK_K=block_k, BLOCK_C=block_g
    )
    launch(_apply_kernel, pixel_blocks * channel_blocks, N)(
        x, factors, qparams, out, P, C, channel_blocks, SILU=silu, **tile
    )


def _channels_of_a_block(channels: int) -> int:
    """The largest power of two that divides them, within limits."""
    least = min(triton.next_power_of_2(channels), _MIN_CHANNELS)
    return max(min(channels & -channels, _MAX_CHANNELS), least)
