"""Which kernel each shape runs on. The guesses need no GPU, only to be told which one there is."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from onlinequant_backend.graph.conv_geometry import ConvGeometry
from onlinequant_backend.kernels.nvidia import tuning
from onlinequant_backend.kernels.nvidia.gpu import Gpu
from onlinequant_backend.kernels.nvidia.tuning import CUBLAS, GATHER, GLUON, TMA, Tile

FP8, INT8 = torch.float8_e4m3fn, torch.int8
ONE, NONE = (1, 1), (0, 0)
PLAIN, POINTWISE = ConvGeometry(ONE, ONE, ONE), ConvGeometry(ONE, NONE, ONE)
EVERY_WAY = ConvGeometry((1, 1, 1), (1, 1, 1), (1, 1, 1))
DILATED = ConvGeometry(ONE, (2, 2), (2, 2))
GPU = Gpu("a GPU", 132, has_tma=True, has_gluon=False)


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_chosen", {})


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
    tiles = tuning.linear_tiles(*shape, dtype, GPU)
    assert kernels(tiles) == expected
    assert tuning.linear_tile(*shape, dtype, GPU) == tiles[0]
    assert len(set(tiles)) == len(tiles)


def test_gpu_without_tma_gathers() -> None:
    old = GPU._replace(has_tma=False)
    assert kernels(tuning.linear_tiles(4096, 640, 640, FP8, old)) == [GATHER] * 3
    assert kernels(tuning.conv_tiles((2, 320, 64, 64), (320, 320, 3, 3), PLAIN, FP8, old)) == [GATHER] * 3
    assert tuning.geglu_tile(640, old) is None


@pytest.mark.parametrize(("inputs", "there"), [(640, True), (30, False)])
def test_geglu(inputs: int, there: bool) -> None:
    tile = tuning.geglu_tile(inputs, GPU)
    assert (tile is not None and tile.kernel == TMA) == there


@pytest.mark.parametrize(
    ("weight", "geometry", "expected"),
    [
        pytest.param((64, 64, 3, 3), PLAIN, TMA, id="3x3"),
        pytest.param((64, 64, 5, 3), ConvGeometry(ONE, NONE, ONE), TMA, id="5x3 without padding"),
        pytest.param((64, 64, 3, 3), ConvGeometry((2, 2), ONE, ONE), TMA, id="stride"),
        pytest.param((64, 48, 3, 3), ConvGeometry((2, 2), ONE, ONE), GATHER, id="stride with few channels"),
        pytest.param((64, 64, 3, 3), ConvGeometry((2, 1), ONE, ONE), GATHER, id="stride over rows"),
        pytest.param((64, 64, 3, 3), ConvGeometry(ONE, (2, 2), (2, 2)), GATHER, id="dilation"),
        pytest.param((64, 4, 3, 3), PLAIN, GATHER, id="4 channels"),
        pytest.param((64, 64, 3, 1, 1), ConvGeometry((1, 1, 1), (1, 0, 0), (1, 1, 1)), TMA, id="over time"),
        pytest.param((64, 64, 3, 3, 3), EVERY_WAY, GATHER, id="3x3x3"),
        pytest.param((64, 64, 3, 1, 1), EVERY_WAY, GATHER, id="over time, padded in space"),
        pytest.param((64, 64, 1, 1), ConvGeometry(ONE, NONE, ONE), CUBLAS, id="1x1"),
        pytest.param((64, 64, 1, 1), ConvGeometry((2, 2), NONE, ONE), TMA, id="1x1 with a stride"),
        pytest.param((64, 64, 1, 1), PLAIN, TMA, id="1x1 with padding"),
    ],
)
def test_conv(weight: tuple[int, ...], geometry: ConvGeometry, expected: str) -> None:
    x = (2, weight[1], *(16 for _ in weight[2:]))
    tiles = tuning.conv_tiles(x, weight, geometry, FP8, GPU)
    assert tiles[0].kernel == expected
    assert tuning.conv_tile(torch.Size(x), torch.Size(weight), geometry, FP8, GPU) == tiles[0]
    assert all(map(tuning.is_valid, tiles))


def test_pointwise_convolution_is_a_linear_layer() -> None:
    tiles = tuning.conv_tiles((2, 64, 9, 7), (32, 64, 1, 1), POINTWISE, FP8, GPU)
    assert tiles == tuning.linear_tiles(2 * 9 * 7, 32, 64, FP8, GPU)


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
    geometry = ConvGeometry(ONE, (weight[2] // 2, 1), ONE)
    tiles = tuning.conv_tiles(x, weight, geometry, FP8, GPU)
    assert (tiles[0].splits > 1) == split
    pixels = x[0] * math.prod(geometry.output_size(x[2:], weight[2:]))
    steps = math.ceil(weight[1] / 128) * weight[2] * weight[3]
    for tile in tiles:
        assert 1 <= tile.splits <= min(16, steps)
        # Splitting is of use only if the waves get shorter by more than they get more.
        blocks = tuning._blocks(tile, pixels, weight[0])
        assert tile.splits == 1 or math.ceil(tile.splits * blocks / 132) / tile.splits < math.ceil(blocks / 132)


def test_splits_are_for_the_gpu_that_is_meant() -> None:
    shape = ((2, 1280, 16, 16), (1280, 1280, 3, 3), PLAIN, FP8)
    splits = []
    for processors in (20, 132, 264):
        splits.append(tuning.conv_tiles(*shape, GPU._replace(processors=processors))[0].splits)
    assert splits == sorted(splits)
    assert splits[0] == 1 < splits[-1]


def test_gathered_convolutions_are_not_split() -> None:
    tiles = tuning.conv_tiles((1, 64, 8, 8), (64, 64, 3, 3), DILATED, FP8, GPU)
    assert {tile.splits for tile in tiles} == {1}


def test_small_blocks_for_small_outputs() -> None:
    large, small = (tuning.linear_tiles(rows, 640, 640, INT8, GPU)[0] for rows in (32768, 64))
    assert large.rows > small.rows == 64


# --- Choices ---


def test_choice_replaces_the_guess() -> None:
    shape = (4096, 640, 640)
    guess, *_, other = tuning.linear_tiles(*shape, FP8, GPU)
    tuning.choose({(*shape, FP8): other}, GPU)
    assert tuning.linear_tile(*shape, FP8, GPU) == other != guess
    assert tuning.linear_tile(*shape, INT8, GPU) != other
    assert tuning.linear_tile(4097, 640, 640, FP8, GPU) == guess
    assert tuning.linear_tile(*shape, FP8, GPU._replace(name="another GPU of this machine")) == guess

    x, weight = (2, 64, 32, 32), (64, 64, 3, 3)
    conv = tuning.conv_tiles(x, weight, PLAIN, INT8, GPU)[-1]
    tuning.choose({(x, weight, PLAIN, INT8): conv}, GPU)
    assert tuning.conv_tile(torch.Size(x), torch.Size(weight), PLAIN, INT8, GPU) == conv
    assert tuning.linear_tile(*shape, FP8, GPU) == other


def test_keys_tell_everything_apart() -> None:
    x, weight = (2, 64, 32, 32), (64, 64, 3, 3)
    shapes: list[tuning.Shape] = [
        *((*shape, FP8) for shape in ((1, 2, 3), (1, 3, 2), (2, 1, 3), (12, 3, 4), (1, 23, 4))),
        (1, 2, 3, INT8),
        (x, weight, PLAIN, FP8),
        (x, weight, PLAIN, INT8),
        (weight, x, PLAIN, FP8),
        *((x, weight, geometry, FP8) for geometry in (POINTWISE, ConvGeometry((2, 2), ONE, ONE))),
        (x, weight, ConvGeometry(ONE, ONE, (2, 2)), FP8),
        *(("attention", *sizes, FP8) for sizes in ((1, 2, 3, 4), (1, 3, 2, 4), (2, 1, 3, 4), (1, 2, 4, 3))),
        ("attention", 1, 2, 3, 4, INT8),
    ]
    assert len(set(map(tuning.key, shapes))) == len(shapes)
    assert tuning.key((torch.Size(x), list(weight), PLAIN, FP8)) == tuning.key((x, weight, PLAIN, FP8))


def test_keys_are_in_the_cache_and_stay() -> None:
    assert tuning.key((12, 32, 48, FP8)) == "linear torch.float8_e4m3fn 12x48 32"
    x, weight = (2, 64, 32, 32), (64, 64, 3, 3)
    assert tuning.key((x, weight, PLAIN, INT8)) == "conv torch.int8 2x64x32x32 64x64x3x3 1x1 1x1 1x1"
    assert tuning.key(("attention", 20, 4096, 77, 64, FP8)) == "attention torch.float8_e4m3fn 20 4096x77 64"


def test_only_tiles_that_are_known_are_valid() -> None:
    tile = tuning.conv_tiles((1, 64, 8, 8), (64, 64, 3, 3), PLAIN, FP8, GPU)[0]
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
def test_gluon_is_offered_unsplit_where_it_can_run(channels: int, stride: int, offered: bool) -> None:
    shapes = (2, channels, 32, 32), (640, channels, 3, 3), ConvGeometry((stride, stride), ONE, ONE)
    assert GLUON not in kernels(tuning.conv_tiles(*shapes, FP8, GPU))
    tiles = tuning.conv_tiles(*shapes, FP8, GPU._replace(has_gluon=True))
    assert (GLUON in kernels(tiles)) == offered
    assert all(tile.splits == 1 for tile in tiles if tile.kernel == GLUON)
    assert all(map(tuning.is_valid, tiles))


def test_stride_is_for_even_sizes_and_whole_blocks_of_channels() -> None:
    stride = ConvGeometry((2, 2), ONE, ONE)
    for channels, sizes, kernel, depth in (
        (320, (64, 64), TMA, 64),
        (640, (32, 32), TMA, 128),
        (640, (31, 32), GATHER, 64),
    ):
        tiles = tuning.conv_tiles((2, channels, *sizes), (640, channels, 3, 3), stride, FP8, GPU)
        assert {tile.kernel for tile in tiles} == {kernel}
        assert kernel == GATHER or {tile.depth for tile in tiles} == {depth}
        assert all(map(tuning.is_valid, tiles))


# --- Attention ---


@pytest.mark.parametrize("size", [40, 64, 80, 128, 160, 256])
@pytest.mark.parametrize("gpu", [GPU, GPU._replace(has_tma=False, has_gluon=False)])
def test_attention_has_tiles_for_all_heads(gpu: Gpu, size: int) -> None:
    tiles = tuning.attention_tiles(20, 4096, 4096, size, FP8, gpu)
    assert {tile.kernel for tile in tiles} == {TMA if gpu.has_tma else GATHER}
    assert all(map(tuning.is_valid, tiles))


def test_few_queries_are_spread_over_more_programs() -> None:
    many, few = (tuning.attention_tile(20, queries, 4096, 64, FP8, GPU) for queries in (4096, 500))
    assert (many.rows, few.rows) == (128, 64)


def test_attention_runs_on_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_chosen", {})
    shape = (20, 4096, 4096, 64, FP8)
    first, *_, last = tuning.attention_tiles(*shape, GPU)
    assert tuning.attention_tile(*shape, GPU) == first
    tuning.choose({("attention", *shape): last}, GPU)
    assert tuning.attention_tile(*shape, GPU) == last
