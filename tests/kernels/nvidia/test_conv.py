from __future__ import annotations

import pytest
import torch

from tests.helpers.kernel_operands import FORMATS, OUTPUTS, assert_near, grow, new_operands, output_of

ONE = (1, 1)
CONVS = [
    # N, H, W, C, K, kernel, padding
    pytest.param(2, 5, 10, 32, 24, (3, 3), (1, 1), id="3x3"),
    pytest.param(1, 6, 7, 16, 9, (3, 3), (0, 0), id="no padding"),
    pytest.param(2, 5, 12, 48, 16, (3, 1), (1, 0), id="over time"),
    pytest.param(1, 5, 3, 16, 8, (5, 5), (2, 2), id="5x5"),
    pytest.param(3, 3, 5, 48, 40, (1, 1), (0, 0), id="1x1"),
    pytest.param(9, 1, 1, 16, 8, (3, 3), (1, 1), id="images of one pixel"),
]


@pytest.fixture(autouse=True)
def _needs_tma(request: pytest.FixtureRequest) -> None:
    on_gpu = "device" in request.fixturenames and request.getfixturevalue("device") == "cuda"
    if on_gpu and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no tensor memory accelerator")


def tile(device: str, splits: int = 1):
    from onlinequant_backend.kernels.nvidia.tuning import TMA, Tile

    return Tile(TMA, 128, 128, 128, 8, 3, splits) if device == "cuda" else Tile(TMA, 32, 16, 32, 4, 2, splits)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("N", "H", "W", "C", "K", "kernel", "padding"), CONVS)
def test_matches_the_reference(N, H, W, C, K, kernel, padding, dtype, device):
    from onlinequant_backend.kernels.nvidia.conv import conv

    H, W, C, K = grow(device, H, W, C, K)
    operands = new_operands((N, H, W, C), (K, *kernel, C), dtype, device)
    expected = operands.conv(ONE, padding, ONE)
    out = output_of(
        lambda out: conv(*operands.arguments, padding, out, tile(device)), expected.shape, torch.float32, device
    )
    assert_near(out, expected, operands)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("N", "H", "W", "C", "K", "kernel", "padding"),
    [
        pytest.param(2, 6, 10, 32, 24, (3, 3), (1, 1), id="3x3"),
        pytest.param(1, 4, 6, 64, 9, (3, 3), (0, 0), id="no padding"),
        pytest.param(3, 2, 4, 32, 8, (5, 2), (2, 3), id="5x2"),
        pytest.param(2, 4, 4, 32, 8, (1, 1), (0, 0), id="1x1"),
    ],
)
def test_stride_of_two(N, H, W, C, K, kernel, padding, dtype, device):
    from onlinequant_backend.kernels.nvidia.conv import conv

    H, W, K = grow(device, H, W, K)
    H, W, C = (H + H % 2, W + W % 2, 4 * C) if device == "cuda" else (H, W, C)
    operands = new_operands((N, H, W, C), (K, *kernel, C), dtype, device)
    expected = operands.conv((2, 2), padding, ONE)
    out = output_of(
        lambda out: conv(*operands.arguments, padding, out, tile(device), stride=2),
        expected.shape,
        torch.float32,
        device,
    )
    assert_near(out, expected, operands)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("size", [pytest.param((5, 7), id="images share a block"), pytest.param((4, 16), id="not")])
def test_output_dtypes_with_all_that_is_added(size, out_dtype, splits, device):
    from onlinequant_backend.kernels.nvidia.conv import conv

    H, W, C, K = grow(device, *size, 32, 17)
    operands = new_operands((2, H, W, C), (K, 3, 3, C), torch.float8_e4m3fn, device, bias=out_dtype)
    expected = operands.conv(ONE, ONE, ONE)
    residual = torch.randn(expected.shape, device=device).to(out_dtype)
    channel_add = torch.randn(2, K + 5, device=device).to(out_dtype)[:, 2 : K + 2]  # part of a merged linear's result
    out = output_of(
        lambda out: conv(*operands.arguments, ONE, out, tile(device, splits), residual, channel_add),
        expected.shape,
        out_dtype,
        device,
    )
    assert_near(out, expected + residual + channel_add[:, None, None], operands)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("splits", [2, 5, 10])
def test_splits(splits, dtype, device):
    """Also more of them than there are steps, and always in one order."""
    from onlinequant_backend.kernels.nvidia.conv import conv

    H, W, C, K = grow(device, 4, 5, 16, 13)
    operands = new_operands((1, H, W, C), (K, 3, 3, C), dtype, device)
    expected = operands.conv(ONE, ONE, ONE)
    first, second = (
        output_of(
            lambda out: conv(*operands.arguments, ONE, out, tile(device, splits)),
            expected.shape,
            torch.float32,
            device,
        )
        for _ in range(2)
    )
    assert_near(first, expected, operands)
    assert torch.equal(first, second)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", FORMATS)
def test_one_weight_scale_and_no_bias(dtype, splits, device):
    from onlinequant_backend.kernels.nvidia.conv import conv

    H, W, C, K = grow(device, 4, 5, 16, 20)
    operands = new_operands((2, H, W, C), (K, 3, 3, C), dtype, device, bias=None, scales=1)
    expected = operands.conv(ONE, ONE, ONE)
    out = output_of(
        lambda out: conv(*operands.arguments, ONE, out, tile(device, splits)), expected.shape, torch.float32, device
    )
    assert_near(out, expected, operands)


@pytest.mark.parametrize(
    ("pixels", "N", "H", "W", "block"),
    [
        pytest.param(128, 2, 128, 128, (1, 8, 16), id="large: one image, almost square"),
        pytest.param(128, 2, 8, 8, (2, 8, 8), id="small images share a block"),
        pytest.param(128, 50, 9, 16, (8, 1, 16), id="nine rows: row by row, without waste"),
        pytest.param(128, 2, 25, 72 * 128, (1, 1, 128), id="over time"),
        pytest.param(512, 1, 1, 512, (1, 2, 256), id="no side of a box has more than 256"),
    ],
)
def test_pixel_block(pixels, N, H, W, block):
    pytest.importorskip("triton", reason="there is no triton: pip install --no-deps triton")
    from onlinequant_backend.kernels.nvidia.conv import pixel_block

    assert pixel_block(pixels, N, H, W) == block
