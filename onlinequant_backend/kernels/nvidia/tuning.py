"""Which kernel each shape runs on, and how that divides its work.

Every shape has a few candidates, the first of which is a good guess. ``selection.layer_timing`` times them and tells
``choose`` which is best; the choices are kept in the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...graph.conv_geometry import ConvGeometry
from .gpu import Gpu

CUBLAS, GLUON, TMA, GATHER = "cublas", "gluon", "tma", "gather"


@dataclasses.dataclass(frozen=True)
class Tile:
    """A kernel and how it divides the work.

    Attributes:
        kernel: "cublas" (the rest is its own affair), "gluon" (convolutions on Hopper GPUs, compute capability 9.0),
            "tma" (operands fetched by the tensor memory accelerator, compute capability 9.0 and later) or "gather" (any
            GPU, any geometry).
        rows, columns, depth: of a block: rows of a matrix product or output pixels; output channels; input channels. Of
            attention: queries; tokens; 0.
        warps, stages: of a Triton launch.
        splits: programs that share the sum of one block, where its blocks alone would leave much of the GPU idle.
    """

    kernel: str
    rows: int = 0
    columns: int = 0
    depth: int = 0
    warps: int = 0
    stages: int = 0
    splits: int = 1


_LINEAR = (Tile(TMA, 256, 128, 128, 8, 3), Tile(TMA, 128, 128, 128, 8, 4), Tile(TMA, 64, 128, 128, 4, 4))
_FEW_ROWS = (Tile(TMA, 64, 256, 128, 4, 3), Tile(TMA, 64, 128, 128, 4, 4), Tile(TMA, 64, 64, 128, 4, 5))
_SHALLOW = Tile(TMA, 128, 64, 64, 4, 6)  # where half of the last block of inputs would be empty otherwise
# Two programs on each processor, so that one computes GELU while the other multiplies: the best at every shape.
_GEGLU = Tile(TMA, 128, 64, 128, 4, 3)
_CONV = (Tile(TMA, 256, 128, 128, 8, 3), Tile(TMA, 128, 128, 128, 8, 4), Tile(TMA, 64, 128, 128, 4, 4))
_GLUON = (Tile(GLUON, 128, 256, 128, 8, 4), Tile(GLUON, 128, 128, 128, 8, 6))
_CONV_HALF_DEPTH = tuple(dataclasses.replace(tile, depth=64) for tile in _CONV)
_GATHER = (Tile(GATHER, 128, 128, 64, 8, 3), Tile(GATHER, 64, 64, 64, 4, 3), Tile(GATHER, 128, 64, 128, 4, 3))
# By the largest head that they are for. Eight warps are two groups, of which one multiplies while the other takes
# exponents; so do two programs of four. Larger heads leave fewer registers for tokens; without the tensor memory
# accelerator these pass through registers, too.
_ATTENTION: dict[str, dict[int, tuple[Tile, ...]]] = {
    TMA: {
        128: (Tile(TMA, 128, 128, 0, 8, 3), Tile(TMA, 64, 128, 0, 4, 3), Tile(TMA, 128, 64, 0, 8, 3)),
        256: (Tile(TMA, 128, 32, 0, 8, 3), Tile(TMA, 64, 32, 0, 4, 3)),
    },
    GATHER: {
        64: (Tile(GATHER, 64, 64, 0, 4, 3), Tile(GATHER, 128, 64, 0, 8, 3)),
        128: (Tile(GATHER, 64, 64, 0, 4, 3), Tile(GATHER, 64, 32, 0, 4, 3)),
        256: (Tile(GATHER, 32, 32, 0, 4, 3), Tile(GATHER, 64, 32, 0, 4, 3)),
    },
}
_MAX_SPLITS = 16

# What a tile is chosen for: (M, N, K, dtype) of a linear layer, (input, weight, geometry, dtype) of a convolution, or
# ("attention", sequences, queries, tokens, size, dtype).
Shape = tuple[Any, ...]
_chosen: dict[tuple[Gpu, Shape], Tile] = {}


def choose(choices: Mapping[Shape, Tile], gpu: Gpu) -> None:
    """Run these shapes on these tiles from now on, on such a GPU."""
    _chosen.update({(gpu, shape): tile for shape, tile in choices.items()})


def key(shape: Shape) -> str:
    """Names a shape; the same in every process."""
    if isinstance(shape[0], int):
        M, N, K, dtype = shape
        return f"linear {dtype} {M}x{K} {N}"
    if shape[0] == "attention":
        _, sequences, queries, tokens, size, dtype = shape
        return f"attention {dtype} {sequences} {queries}x{tokens} {size}"
    x, weight, geometry, dtype = shape
    numbers = " ".join("x".join(map(str, part)) for part in (x, weight, *geometry))
    return f"conv {dtype} {numbers}"


def linear_tile(M: int, N: int, K: int, dtype: torch.dtype, gpu: Gpu) -> Tile:
    """The tile of a linear layer: [M, K] by [N, K]."""
    return _chosen.get((gpu, (M, N, K, dtype))) or linear_tiles(M, N, K, dtype, gpu)[0]


def conv_tile(
    x: tuple[int, ...], weight: tuple[int, ...], geometry: ConvGeometry, dtype: torch.dtype, gpu: Gpu
) -> Tile:
    """The tile of a convolution: [N, C, *spatial] by [K, C, *kernel]."""
    known = _chosen.get((gpu, (x, weight, geometry, dtype)))
    return known or conv_tiles(x, weight, geometry, dtype, gpu)[0]


def attention_tile(sequences: int, queries: int, tokens: int, size: int, dtype: torch.dtype, gpu: Gpu) -> Tile:
    """The tile of attention: of all heads of all batch entries, [queries, size] over [tokens, size]."""
    known = _chosen.get((gpu, ("attention", sequences, queries, tokens, size, dtype)))
    return known or attention_tiles(sequences, queries, tokens, size, dtype, gpu)[0]


@functools.lru_cache(maxsize=4096)
def attention_tiles(
    sequences: int, queries: int, tokens: int, size: int, dtype: torch.dtype, gpu: Gpu
) -> tuple[Tile, ...]:
    """The candidates of attention, the best guess first: few rows where many would leave processors idle."""
    # In int8, whose values are in float, it gave results for heads of 160 that were no numbers (H200, Triton 3.6).
    has_tma = gpu.has_tma and (dtype.is_floating_point or size <= 128)
    by_size = _ATTENTION[TMA if has_tma else GATHER]
    tiles = next((tiles for largest, tiles in by_size.items() if size <= largest), by_size[256])
    return tuple(sorted(tiles, key=lambda tile: _blocks(tile, queries, 1) * sequences < gpu.processors))


@functools.lru_cache(maxsize=4096)
def linear_tiles(M: int, N: int, K: int, dtype: torch.dtype, gpu: Gpu) -> tuple[Tile, ...]:
    """The candidates of a linear layer, the best guess first."""
    if K % 16 or not gpu.has_tma:
        return _by_blocks(_GATHER, gpu, M, N)
    own = _by_blocks(_LINEAR if M > 64 else _FEW_ROWS, gpu, M, N)
    if M > 64 and 0 < K % 128 <= 64:
        own = (_SHALLOW, *own)
    # cuBLAS has no fp8 product for a handful of rows.
    return (Tile(CUBLAS), *own) if dtype.is_floating_point and N % 16 == 0 and M >= 16 else own


def geglu_tile(K: int, gpu: Gpu) -> Tile | None:
    """The tile of a linear layer with K inputs and GEGLU; None where the kernel cannot run."""
    return None if K % 16 or not gpu.has_tma else _GEGLU


@functools.lru_cache(maxsize=4096)
def conv_tiles(
    x: tuple[int, ...], weight: tuple[int, ...], geometry: ConvGeometry, dtype: torch.dtype, gpu: Gpu
) -> tuple[Tile, ...]:
    """The candidates of a convolution, the best guess first."""
    pixels = x[0] * math.prod(geometry.output_size(x[2:], weight[2:]))
    if geometry.is_pointwise(weight):
        return linear_tiles(pixels, weight[0], weight[1], dtype, gpu)
    if not (_fits_tma(x, weight, geometry) and gpu.has_tma):
        return _by_blocks(_GATHER, gpu, pixels, weight[0])
    # With a stride, blocks of channels must not reach into the next pixel.
    tiles = _CONV if geometry.stride[-1] == 1 or weight[1] % 128 == 0 else _CONV_HALF_DEPTH
    steps = math.ceil(weight[1] / 128) * math.prod(weight[2:])
    split = [
        dataclasses.replace(tile, splits=splits)
        for tile in tiles
        for splits in range(1, max(min(steps // 4, _MAX_SPLITS), 1) + 1)
    ]
    # Of each tile the best number of programs for a block, and one: what splitting costs is the vaguer guess.
    guessed = _by_blocks(split, gpu, pixels, weight[0], steps)
    best = [next(tile for tile in guessed if tile.rows == block.rows) for block in tiles]
    if gpu.has_gluon and tiles is _CONV:
        best += _GLUON
    return _by_blocks(tuple(dict.fromkeys((*best, *tiles))), gpu, pixels, weight[0], steps)


def is_valid(tile: Tile) -> bool:
    """Whether ``tile`` is among the candidates of any shape."""
    unsplit = dataclasses.replace(tile, splits=1)
    known = unsplit in (Tile(CUBLAS), *_LINEAR, *_FEW_ROWS, _SHALLOW, *_CONV, *_CONV_HALF_DEPTH, *_GLUON, *_GATHER)
    known |= any(tile in tiles for by_size in _ATTENTION.values() for tiles in by_size.values())
    return known and type(tile.splits) is int and 1 <= tile.splits <= _MAX_SPLITS


def _fits_tma(x: Sequence[int], weight: Sequence[int], geometry: ConvGeometry) -> bool:
    """Whether a convolution is one over rows and columns, of stride 1 or 2, or of stride 1 over frames alone."""
    stride, padding, dilation = geometry
    if any(step != 1 for step in dilation) or weight[1] % 16:
        return False
    if len(weight) == 4 and tuple(stride) == (2, 2):
        return weight[1] % 64 == 0 and all(size % 2 == 0 for size in x[2:])
    over_time = len(weight) == 5 and tuple(weight[3:]) == (1, 1) and tuple(padding[1:]) == (0, 0)
    return all(step == 1 for step in stride) and (len(weight) == 4 or over_time)


def _by_blocks(tiles: Sequence[Tile], gpu: Gpu, rows: int, columns: int, steps: int = 1) -> tuple[Tile, ...]:
    """``tiles``, quickest first by a guess in microseconds of an H200, for sums of ``steps`` * 128 products.

    Every processor works on one block at a time, so the time goes in waves, and the last may be nearly empty: then
    shorter waves of more programs can win. A block takes a time that grows with its area, and a part that does not
    (fitted to convolutions, before they could have several programs a block); Gluon's take three quarters of it. The
    sums of several programs are written, read and added up in a kernel of its own, whose time is an estimate from the
    bytes.
    """

    def time(tile: Tile) -> float:
        waves = math.ceil(_blocks(tile, rows, columns) * tile.splits / gpu.processors)
        products = waves * steps / tile.splits * (tile.rows * tile.columns + 6500) * 2.4e-5
        if tile.kernel == GLUON:
            products *= 0.75
        return products + (3 + tile.splits * rows * columns * 2e-6 if tile.splits > 1 else 0)

    return tuple(sorted(tiles, key=time))


def _blocks(tile: Tile, rows: int, columns: int) -> int:
    return math.ceil(rows / tile.rows) * math.ceil(columns / tile.columns)
