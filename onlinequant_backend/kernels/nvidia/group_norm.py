"""GroupNorm, SiLU and quantization of the result, channels last.

Where a group of an image fits into a multiprocessor's registers, one kernel does everything: every value is read once
and written once. Elsewhere they are read twice: one kernel sums up parts of each image channel by channel, a tiny one
makes of that a factor and a summand for each channel, and one applies them. Inductor's own kernels for channels-last
tensors take several times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .epilogue import PTX, store
from .launch import launch, processors

# Elements of a block: a thread of four warps has four loads of 16 bytes of 16-bit numbers under way.
_BLOCK = 4096
_WARPS = 4
# Of a block: a line of memory of 16-bit numbers at least, and not so many that most of the last block is empty.
_MIN_CHANNELS, _MAX_CHANNELS = 64, 256
# Programs that sum up, for each multiprocessor: what fits there at once.
_PROGRAMS = 4
# Pixels of an image whose groups one program each keeps, and values of a group, padded: 80 in each thread of 16 warps.
_MOST_PIXELS, _MOST_VALUES = 1024, 40960
_MOST_WARPS = 16
# How often a multiprocessor may have that many to do in turn, see ``fits_one_kernel``.
_MOST_TURNS = 2


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
def _silu(y):
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
        y = _silu(y)
    store(y, out + start, places, mask, qparams)


@triton.jit
def _load_channels(x, i, P, C, SIZE: tl.constexpr, BLOCK_P: tl.constexpr):
    """Channels ``i`` of the program's group: values [BLOCK_P, i], their places in ``x`` [P, C], and which there are."""
    row = tl.arange(0, BLOCK_P)
    places = row[:, None] * C + (tl.program_id(0) * SIZE + i)[None, :]
    mask = (row < P)[:, None] & (i < SIZE)[None, :]
    return tl.load(x + places, mask=mask, other=0.0).to(tl.float32), places, mask


@triton.jit
def _store_channels(y, i, factor, weight, bias, qparams, out, places, mask, SIZE: tl.constexpr, SILU: tl.constexpr):
    """What becomes of distances ``y`` from the mean, in channels ``i`` of the program's group."""
    c = tl.program_id(0) * SIZE + i
    if weight is not None:
        factor *= tl.load(weight + c, mask=i < SIZE, other=0.0).to(tl.float32)[None, :]
    y *= factor
    if bias is not None:
        y += tl.load(bias + c, mask=i < SIZE, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = _silu(y)
    store(y, out, places, mask, qparams)


@triton.jit
def _group_kernel(
    x,
    weight,
    bias,
    qparams,
    out,
    P,
    C,
    eps,
    SIZE: tl.constexpr,
    FULL: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """The SIZE channels of a group, in two tiles: LEFT of them, and up to RIGHT. FULL: P is BLOCK_P.

    x and out [N, P, C], weight and bias [C]; the grid is groups, N.
    """
    if FULL:
        P = BLOCK_P  # saves the masks, a fifth of the instructions
    n = tl.program_id(1).to(tl.int64)
    x += n * P * C
    out += n * P * C
    i = tl.arange(0, LEFT)
    j = LEFT + tl.arange(0, RIGHT)
    left, left_places, left_mask = _load_channels(x, i, P, C, SIZE, BLOCK_P)
    right, right_places, right_mask = _load_channels(x, j, P, C, SIZE, BLOCK_P)
    mean = (tl.sum(left) + tl.sum(right)) / (P * SIZE)
    left = tl.where(left_mask, left - mean, 0.0)
    right = tl.where(right_mask, right - mean, 0.0)
    variance = (tl.sum(left * left) + tl.sum(right * right)) / (P * SIZE)
    factor = tl.rsqrt(variance + eps)
    _store_channels(left, i, factor, weight, bias, qparams, out, left_places, left_mask, SIZE, SILU)
    _store_channels(right, j, factor, weight, bias, qparams, out, right_places, right_mask, SIZE, SILU)


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


def fits_one_kernel(shape: Sequence[int], groups: int, multiprocessors: int) -> bool:
    """Whether ``one_kernel`` can take an x of this ``shape`` [N, P, C], and is not slower than ``three_kernels``.

    On an H200, two images: [1024, 640] 8 us instead of 11, [1024, 1280] 9 instead of 17. But every pixel is a line of
    memory of its own, of which a group needs a few bytes: [4096, 320] takes 23 us instead of 12. And further turns cost
    as much again, while the three kernels, which read whole lines, hardly notice them.
    """
    N, P, C = shape
    block_p, left, right = _tiles(P, C // groups)
    values = block_p * (left + right)
    turns = triton.cdiv(N * groups, multiprocessors)
    fits = P <= _MOST_PIXELS and values <= _MOST_VALUES
    return fits and turns * values <= _MOST_TURNS * _MOST_VALUES


def one_kernel(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    qparams: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``group_norm`` by a program for each group of each image."""
    N, P, C = x.shape
    size = C // groups
    block_p, left, right = _tiles(P, size)
    # 32 values in each thread, if that is not too many warps.
    warps = min(max(triton.next_power_of_2(block_p * (left + right)) // 1024, 1), _MOST_WARPS)
    launch(_group_kernel, groups, N)(
        x,
        weight,
        bias,
        qparams,
        out,
        P,
        C,
        eps,
        SIZE=size,
        FULL=block_p == P,
        SILU=silu,
        BLOCK_P=block_p,
        LEFT=left,
        RIGHT=right,
        num_warps=warps,
    )


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


def _tiles(pixels: int, size: int) -> tuple[int, int, int]:
    """Powers of two that hold a group of ``size`` channels: pixels, and channels of either tile.

    10 channels are 8 and 2, not 16.
    """
    left = max(triton.next_power_of_2(size) // 2, 1)
    right = triton.next_power_of_2(max(size - left, 1))
    return triton.next_power_of_2(pixels), left, right
