"""Which kernel each shape runs on. The guesses need no GPU, only to be told which one there is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch

from onlinequant_backend.kernels.nvidia import tuning
from onlinequant_backend.kernels.nvidia.tuning import CUBLAS, GATHER, GLUON, TMA, Tile

FP8, INT8 = torch.float8_e4m3fn, torch.int8
ONE, NONE = (1, 1), (0, 0)
PLAIN: tuning.Geometry = (ONE, ONE, ONE)
Gpu = Callable[..., None]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """``gpu(tma=True, processors=132, gluon=False)``; so it is, unless a test says otherwise."""
    cached = (tuning.linear_tiles, tuning.conv_tiles)
    monkeypatch.setattr(tuning, "_chosen", {})

    def set_gpu(tma: bool = True, processors: int = 132, gluon: bool = False) -> None:
        monkeypatch.setattr(tuning, "_has_tma", lambda: tma)
        monkeypatch.setattr(tuning, "_has_gluon", lambda: gluon)
        monkeypatch.setattr(tuning, "_processors", lambda: processors)
        for tiles in cached:
            tiles.cache_clear()

    set_gpu()
    yield set_gpu
    for tiles in cached:
        tiles.cache_clear()


def kernels(tiles: tuple[Tile, ...]) -> list[str]:
    return [tile.kernel for tile in tiles]


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        pytest.param((4096, 640, 640), FP8, [CUBLAS, TMA, TMA, TMA], id="fp8"),
        pytest.param((4096, 640, 640), INT8, [TMA] * 3, id="int8"),
        pytest.param((8, 640, 640), FP8, [TMA] * 3, id="too few rows for cuBLAS"),
        pytest.param((4096, 4, 640), FP8, [TMA] * 3, id="outputs that cuBLAS cannot"),
        pytest.param((4096, 640, 30), FP8, [GATHER] * 3, id="inputs that only plain pointers can"),
        pytest.param((4096, 640, 30), INT8, [GATHER] * 3, id="the same in int8"),
    ],
)
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype, expected: list[str]) -> None:
    tiles = tuning.linear_tiles(*shape, dtype)
    assert kernels(tiles) == expected
    assert tuning.linear_tile(*shape, dtype) == tiles[0]
    assert len(set(tiles)) == len(tiles)


def test_gpu_without_tma_gathers(gpu: Gpu) -> None:
    gpu(tma=False)
    assert kernels(tuning.linear_tiles(4096, 640, 640, FP8)) == [GATHER] * 3
    assert kernels(tuning.conv_tiles((2, 320, 64, 64), (320, 320, 3, 3), PLAIN, FP8)) == [GATHER] * 3
    assert tuning.geglu_tile(640) is None


@pytest.mark.parametrize(("inputs", "there"), [(640, True), (30, False)])
def test_geglu(inputs: int, there: bool) -> None:
    tile = tuning.geglu_tile(inputs)
    assert (tile is not None and tile.kernel == TMA) == there


@pytest.mark.parametrize(
    ("weight", "geometry", "expected"),
    [
        pytest.param((64, 64, 3, 3), PLAIN, TMA, id="3x3"),
        pytest.param((64, 64, 5, 3), (ONE, NONE, ONE), TMA, id="5x3 without padding"),
        pytest.param((64, 64, 3, 3), ((2, 2), ONE, ONE), TMA, id="stride"),
        pytest.param((64, 48, 3, 3), ((2, 2), ONE, ONE), GATHER, id="stride with few channels"),
        pytest.param((64, 64, 3, 3), ((2, 1), ONE, ONE), GATHER, id="stride over rows"),
        pytest.param((64, 64, 3, 3), (ONE, (2, 2), (2, 2)), GATHER, id="dilation"),
        pytest.param((64, 4, 3, 3), PLAIN, GATHER, id="4 channels"),
        pytest.param((64, 64, 3, 1, 1), ((1, 1, 1), (1, 0, 0), (1, 1, 1)), TMA, id="over time"),
        pytest.param((64, 64, 3, 3, 3), ((1, 1, 1), (1, 1, 1), (1, 1, 1)), GATHER, id="3x3x3"),
        pytest.param((64, 64, 3, 1, 1), ((1, 1, 1), (1, 1, 1), (1, 1, 1)), GATHER, id="over time, padded in space"),
        pytest.param((64, 64, 1, 1), (ONE, NONE, ONE), CUBLAS, id="1x1"),
        pytest.param((64, 64, 1, 1), ((2, 2), NONE, ONE), TMA, id="1x1 with a stride"),
        pytest.param((64, 64, 1, 1), PLAIN, TMA, id="1x1 with padding"),
    ],
)
def test_conv(weight: tuple[int, ...], geometry: tuning.Geometry, expected: str) -> None:
    x = (2, weight[1], *(16 for _ in weight[2:]))
    tiles = tuning.conv_tiles(x, weight, geometry, FP8)
    assert tiles[0].kernel == expected
    assert tuning.conv_tile(torch.Size(x), torch.Size(weight), geometry, FP8) == tiles[0]
    assert all(map(tuning.is_valid, tiles))


def test_pointwise_convolution_is_a_linear_layer() -> None:
    assert tuning.is_pointwise((8, 4, 1, 1), (ONE, NONE, ONE))
    assert tuning.is_pointwise((8, 4, 1, 1, 1), ((1, 1, 1), (0, 0, 0), (1, 1, 1)))
    assert not tuning.is_pointwise((8, 4, 1, 3), (ONE, NONE, ONE))
    for geometry in ((ONE, (0, 1), ONE), ((1, 2), NONE, ONE)):
        assert not tuning.is_pointwise((8, 4, 1, 1), geometry)
    tiles = tuning.conv_tiles((2, 64, 9, 7), (32, 64, 1, 1), (ONE, NONE, ONE), FP8)
    assert tiles == tuning.linear_tiles(2 * 9 * 7, 32, 64, FP8)


@pytest.mark.parametrize(
    ("shape", "kernel", "geometry"),
    [
        ((9, 8), (3, 3), PLAIN),
        ((9, 8), (3, 2), ((2, 1), (0, 1), (1, 3))),
        ((5, 9, 8), (3, 1, 1), ((1, 2, 2), (1, 0, 0), (1, 1, 1))),
    ],
)
def test_output_size_is_that_of_torch(
    shape: tuple[int, ...], kernel: tuple[int, ...], geometry: tuning.Geometry
) -> None:
    convolve = torch.conv2d if len(shape) == 2 else torch.conv3d
    y = convolve(torch.zeros(1, 1, *shape), torch.zeros(1, 1, *kernel), None, *geometry)
    assert tuning.output_size(shape, kernel, geometry) == y.shape[2:]


# --- Splits ---


@pytest.mark.parametrize(
    ("x", "weight", "split"),
    [
        pytest.param((2, 1280, 8, 8), (1280, 1280, 3, 3), True, id="few pixels"),
        pytest.param((2, 320, 128, 128), (320, 320, 3, 3), False, id="many pixels"),
        pytest.param((1, 640, 8, 8), (64, 640, 3, 3), True, id="one block"),
        pytest.param((2, 2560, 32, 32), (1280, 2560, 3, 3), True, id="one wave that is not full"),
        pytest.param((1, 16, 8, 8), (16, 16, 1, 3), False, id="nothing to share"),
    ],
)
def test_sums_are_split_where_blocks_are_few(x: tuple[int, ...], weight: tuple[int, ...], split: bool) -> None:
    geometry: tuning.Geometry = (ONE, (weight[2] // 2, 1), ONE)
    tiles = tuning.conv_tiles(x, weight, geometry, FP8)
    assert (tiles[0].splits > 1) == split
    pixels = x[0] * math.prod(tuning.output_size(x[2:], weight[2:], geometry))
    steps = math.ceil(weight[1] / 128) * weight[2] * weight[3]
    for tile in tiles:
        assert 1 <= tile.splits <= min(16, steps)
        # Splitting is of use only if the waves get shorter by more than they get more.
        blocks = tuning._blocks(tile, pixels, weight[0])
        assert tile.splits == 1 or math.ceil(tile.splits * blocks / 132) / tile.splits < math.ceil(blocks / 132)


def test_splits_are_for_the_gpu_there_is(gpu: Gpu) -> None:
    shape = ((2, 1280, 16, 16), (1280, 1280, 3, 3), PLAIN, FP8)
    splits = []
    for processors in (20, 132, 264):
        gpu(processors=processors)
        splits.append(tuning.conv_tiles(*shape)[0].splits)
    assert splits == sorted(splits)
    assert splits[0] == 1 < splits[-1]


def test_gathered_convolutions_are_not_split() -> None:
    tiles = tuning.conv_tiles((1, 64, 8, 8), (64, 64, 3, 3), (ONE, (2, 2), (2, 2)), FP8)
    assert {tile.splits for tile in tiles} == {1}


def test_small_blocks_for_small_outputs() -> None:
    large, small = (tuning.linear_tiles(rows, 640, 640, INT8)[0] for rows in (32768, 64))
    assert large.rows > small.rows == 64


# --- Choices ---


def test_choice_replaces_the_guess() -> None:
    shape = (4096, 640, 640)
    guess, *_, other = tuning.linear_tiles(*shape, FP8)
    assert tuning.chosen() == {}
    tuning.choose({tuning.linear_key(*shape, FP8): other})
    assert tuning.linear_tile(*shape, FP8) == other != guess
    assert tuning.linear_tile(*shape, INT8) != other
    assert tuning.linear_tile(4097, 640, 640, FP8) == guess
    chosen = tuning.chosen()
    chosen.clear()
    assert tuning.chosen() == {tuning.linear_key(*shape, FP8): other}

    x, weight = (2, 64, 32, 32), (64, 64, 3, 3)
    conv = tuning.conv_tiles(x, weight, PLAIN, INT8)[-1]
    tuning.choose({tuning.conv_key(x, weight, PLAIN, INT8): conv})
    assert tuning.conv_tile(list(x), list(weight), PLAIN, INT8) == conv
    assert len(tuning.chosen()) == 2


def test_keys_tell_everything_apart() -> None:
    x, weight = (2, 64, 32, 32), (64, 64, 3, 3)
    keys = [
        *(tuning.linear_key(*shape, FP8) for shape in ((1, 2, 3), (1, 3, 2), (2, 1, 3), (12, 3, 4), (1, 23, 4))),
        tuning.linear_key(1, 2, 3, INT8),
        tuning.conv_key(x, weight, PLAIN, FP8),
        tuning.conv_key(x, weight, PLAIN, INT8),
        tuning.conv_key(weight, x, PLAIN, FP8),
        *(tuning.conv_key(x, weight, geometry, FP8) for geometry in ((ONE, NONE, ONE), ((2, 2), ONE, ONE))),
        tuning.conv_key(x, weight, (ONE, ONE, (2, 2)), FP8),
    ]
    assert len(set(keys)) == len(keys)
    assert tuning.conv_key(torch.Size(x), list(weight), PLAIN, FP8) == tuning.conv_key(x, weight, PLAIN, FP8)


def test_only_tiles_that_are_known_are_valid() -> None:
    tile = tuning.conv_tiles((1, 64, 8, 8), (64, 64, 3, 3), PLAIN, FP8)[0]
    for good in (tile, Tile(CUBLAS), dataclasses.replace(tile, splits=16)):
        assert tuning.is_valid(good)
    for changes in ({"splits": 0}, {"splits": 17}, {"splits": 1.0}, {"rows": 3}, {"kernel": "cutlass"}, {"warps": 64}):
        assert not tuning.is_valid(dataclasses.replace(tile, **changes))


@pytest.mark.parametrize(
    ("channels", "stride", "offered"),
    [
        pytest.param(640, 1, True, id="plain"),
        pytest.param(640, 2, True, id="stride"),
        pytest.param(320, 2, False, id="stride and half a block of channels"),
        pytest.param(20, 1, False, id="no whole vectors"),
    ],
)
def test_gluon_is_offered_unsplit_where_it_can_run(channels: int, stride: int, offered: bool, gpu: Gpu) -> None:
    shapes = (2, channels, 32, 32), (640, channels, 3, 3), ((stride, stride), ONE, ONE)
    assert GLUON not in kernels(tuning.conv_tiles(*shapes, FP8))
    gpu(gluon=True)
    tiles = tuning.conv_tiles(*shapes, FP8)
    assert (GLUON in kernels(tiles)) == offered
    assert all(tile.splits == 1 for tile in tiles if tile.kernel == GLUON)
    assert all(map(tuning.is_valid, tiles))


def test_stride_is_for_even_sizes_and_whole_blocks_of_channels() -> None:
    stride: tuning.Geometry = ((2, 2), ONE, ONE)
    for channels, sizes, kernel, depth in (
        (320, (64, 64), TMA, 64),
        (640, (32, 32), TMA, 128),
        (640, (31, 32), GATHER, 64),
    ):
        tiles = tuning.conv_tiles((2, channels, *sizes), (640, channels, 3, 3), stride, FP8)
        assert {tile.kernel for tile in tiles} == {kernel}
        assert kernel == GATHER or {tile.depth for tile in tiles} == {depth}
        assert all(map(tuning.is_valid, tiles))
