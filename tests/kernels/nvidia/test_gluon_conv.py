"""The Gluon convolution, on Hopper GPUs; anywhere else only that it compiles for them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from onlinequant_backend.kernels.nvidia import families
from onlinequant_backend.kernels.nvidia.tuning import GLUON, Tile
from tests.helpers.kernel_operands import FORMATS, assert_near, new_operands, output_of

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
TILES = [
    pytest.param(Tile(GLUON, 128, 256, 128, 8, 4), id="128x256"),
    pytest.param(Tile(GLUON, 128, 128, 128, 8, 6), id="128x128"),
]


@hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("shape", "K", "kernel", "padding", "stride"),
    [
        pytest.param((2, 19, 37, 80), 144, (3, 3), (1, 1), 1, id="3x3"),
        pytest.param((5, 9, 11, 64), 128, (3, 3), (1, 1), 1, id="images share a block"),
        pytest.param((1, 19, 37, 96), 100, (3, 3), (0, 0), 1, id="channels that the TMA cannot store"),
        pytest.param((2, 37, 19, 256), 264, (3, 1), (1, 0), 1, id="over time"),
        pytest.param((2, 20, 38, 128), 144, (3, 3), (1, 1), 2, id="stride of two"),
        pytest.param((2, 64, 64, 192), 640, (3, 3), (1, 1), 1, id="more blocks than processors"),
    ],
)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_matches_the_reference(shape, K, kernel, padding, stride, out_dtype, dtype, tile):
    from onlinequant_backend.kernels.nvidia.gluon_conv import gluon_conv

    operands = new_operands(shape, (K, *kernel, shape[-1]), dtype, "cuda", bias=out_dtype)
    added = torch.randn(shape[0], 2 * K, device="cuda", dtype=out_dtype)[:, :K]
    expected = operands.conv((stride, stride), padding, (1, 1)) + added.float()[:, None, None]

    def convolve(out: torch.Tensor) -> None:
        gluon_conv(*operands.arguments, padding, out, tile, added, stride)

    assert_near(output_of(convolve, expected.shape, out_dtype, "cuda"), expected, operands)


@pytest.mark.parametrize(
    "tile",
    [
        pytest.param(Tile(GLUON, 128, 128, 128, 8, 6, splits=2), id="splits"),
        pytest.param(Tile(GLUON, 128, 128, 128, 4, 6), id="other warps"),
    ],
)
def test_other_tiles_are_refused(tile: Tile) -> None:
    if reason := families.missing_gluon():
        pytest.skip(reason)
    from onlinequant_backend.kernels.nvidia.gluon_conv import gluon_conv

    x, weight, out = torch.empty(1, 4, 4, 128), torch.empty(8, 3, 3, 128), torch.empty(1, 4, 4, 8)
    with pytest.raises(ValueError, match="no such tile"):
        gluon_conv(x, torch.ones(1), weight, torch.ones(8), None, (1, 1), out, tile)


@pytest.mark.parametrize(
    "case",
    [
        {"has_more": True},
        {"columns": 256, "stages": 4},
        {"dtype": "i8", "stride": 2, "block": (4, 4, 8), "has_more": True},
        {"out": "fp32", "is_boxed": False},
    ],
    ids=lambda case: " ".join(case),
)
def test_compiles_for_hopper_with_both_operands_in_shared_memory(case: dict[str, Any], tmp_path: Path) -> None:
    if reason := families.missing_gluon():
        pytest.skip(reason)
    script = Path(__file__).with_name("compile_gluon.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), json.dumps(case)]
    ptx = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    products = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", ptx)
    assert products
    assert set(products) == {"%"}  # a descriptor, and not the registers of a group, in braces
    assert "cp.async.bulk.tensor" in ptx
    assert ("cp.async.bulk.tensor.4d.global.shared" in ptx) == case.get("is_boxed", True)
