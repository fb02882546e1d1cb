"""GroupNorm, SiLU and quantization of the result in one kernel, for groups that fit into registers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .epilogue import silu, store
from .launch import launch

# Pixels of an image whose groups one program each keeps, and values of a group, padded: 80 in each thread of 16 warps.
_MOST_PIXELS, _MOST_VALUES = 1024, 40960
_MOST_WARPS = 16
# How often a multiprocessor may have that many to do in turn, see ``fits_one_kernel``.
_MOST_TURNS = 2


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
        y = silu(y)
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


def _tiles(pixels: int, size: int) -> tuple[int, int, int]:
    """Powers of two that hold a group of ``size`` channels: pixels, and channels of either tile.

    10 channels are 8 and 2, not 16.
    """
    left = max(triton.next_power_of_2(size) // 2, 1)
    right = triton.next_power_of_2(max(size - left, 1))
    return triton.next_power_of_2(pixels), left, right
