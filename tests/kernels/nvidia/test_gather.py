from __future__ import annotations

import pytest
import torch

from tests.helpers.kernel_operands import FORMATS, OUTPUTS, assert_near, grow, new_operands, output_of

CONVS = [
    # input, outputs, kernel, stride, padding, dilation
    pytest.param((2, 5, 6, 40), 17, (3, 3), (1, 1), (1, 1), (1, 1), id="3x3"),
    pytest.param((2, 9, 6, 32), 8, (3, 3), (2, 2), (1, 1), (1, 1), id="stride"),
    pytest.param((1, 6, 7, 16), 9, (3, 3), (1, 1), (0, 0), (1, 1), id="no padding"),
    pytest.param((2, 5, 7, 4), 5, (3, 3), (1, 1), (2, 2), (2, 2), id="dilation"),
    pytest.param((1, 9, 9, 3), 4, (4, 2), (2, 1), (1, 0), (1, 2), id="lopsided"),
    pytest.param((1, 6, 6, 1), 1, (5, 5), (1, 1), (2, 2), (1, 1), id="one channel"),
    pytest.param((2, 5, 3, 70), 6, (1, 1), (1, 1), (0, 0), (1, 1), id="1x1"),
    pytest.param((2, 1, 1, 16), 8, (3, 3), (1, 1), (1, 1), (1, 1), id="one pixel"),
    pytest.param((2, 5, 4, 3, 8), 6, (3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1), id="over time"),
    pytest.param((2, 4, 5, 6, 5), 7, (3, 3, 3), (1, 2, 2), (1, 1, 0), (1, 1, 2), id="3x3x3"),
]
LINEARS = [
    # M, K, N
    pytest.param(32, 64, 32, id="even"),
    pytest.param(20, 33, 17, id="odd"),
    pytest.param(1, 7, 3, id="one row"),
    pytest.param(300, 5, 2, id="more row blocks than a group has"),
]


def tile(device: str, splits: int = 1):
    from onlinequant_backend.kernels.nvidia.tuning import GATHER, Tile

    return Tile(GATHER, 128, 64, 64, 4, 3, splits) if device == "cuda" else Tile(GATHER, 32, 16, 32, 4, 2, splits)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("x", "K", "kernel", "stride", "padding", "dilation"), CONVS)
def test_matches_the_reference(x, K, kernel, stride, padding, dilation, dtype, device):
    from onlinequant_backend.kernels.nvidia.gather import gather_conv

    N, *spatial, C = x
    *spatial, C, K = grow(device, *spatial, C, K)
    operands = new_operands((N, *spatial, C), (K, *kernel, C), dtype, device)
    expected = operands.conv(stride, padding, dilation)
    out = output_of(
        lambda out: gather_conv(*operands.arguments, stride, padding, dilation, out, tile(device)),
        expected.shape,
        torch.float32,
        device,
    )
    assert_near(out, expected, operands)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("M", "K", "N"), LINEARS)
def test_linear(M, K, N, dtype, device):
    from onlinequant_backend.kernels.nvidia.gather import gather_conv

    M, K, N = grow(device, M, K, N)
    operands = new_operands((M, K), (N, K), dtype, device)
    out = output_of(
        lambda out: gather_conv(*operands.arguments, (), (), (), out, tile(device)), (M, N), torch.float32, device
    )
    assert_near(out, operands.linear(), operands)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("out_dtype", OUTPUTS)
def test_output_dtypes_with_all_that_is_added(out_dtype, splits, device):
    from onlinequant_backend.kernels.nvidia.gather import gather_conv

    D, H, W, C, K = grow(device, 2, 3, 5, 9, 17)
    operands = new_operands((2, D, H, W, C), (K, 1, 3, 3, C), torch.float8_e4m3fn, device, bias=out_dtype)
    geometry = (1, 2, 1), (0, 1, 1), (1, 1, 1)
    expected = operands.conv(*geometry)
    residual = torch.randn(expected.shape, device=device).to(out_dtype)
    channel_add = torch.randn(2, K + 5, device=device).to(out_dtype)[:, 2 : K + 2]  # part of a merged linear's result
    out = output_of(
        lambda out: gather_conv(*operands.arguments, *geometry, out, tile(device, splits), residual, channel_add),
        expected.shape,
        out_dtype,
        device,
    )
    assert_near(out, expected + residual + channel_add[:, None, None, None], operands)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("splits", [2, 5, 10])
def test_splits(splits, dtype, device):
    """Also more of them than there are steps, and always in one order."""
    from onlinequant_backend.kernels.nvidia.gather import gather_conv

    H, W, C, K = grow(device, 7, 5, 17, 13)
    operands = new_operands((2, H, W, C), (K, 3, 3, C), dtype, device)
    geometry = (2, 2), (1, 1), (1, 1)
    expected = operands.conv(*geometry)
    first, second = (
        output_of(
            lambda out: gather_conv(*operands.arguments, *geometry, out, tile(device, splits)),
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
    from onlinequant_backend.kernels.nvidia.gather import gather_conv

    H, W, C, K = grow(device, 5, 5, 16, 20)
    operands = new_operands((1, H, W, C), (K, 3, 3, C), dtype, device, bias=None, scales=1)
    geometry = (2, 2), (1, 1), (1, 1)
    expected = operands.conv(*geometry)
    out = output_of(
        lambda out: gather_conv(*operands.arguments, *geometry, out, tile(device, splits)),
        expected.shape,
        torch.float32,
        device,
    )
    assert_near(out, expected, operands)
