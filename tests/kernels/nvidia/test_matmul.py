from __future__ import annotations

import pytest
import torch

from onlinequant_backend.kernels import reference
from tests.helpers.kernel_operands import FORMATS, OUTPUTS, assert_near, assert_near_8bit, grow, new_operands, output_of

MATMULS = [
    # M, K, N
    pytest.param(32, 64, 32, id="even"),
    pytest.param(20, 48, 50, id="tails"),
    pytest.param(1, 16, 3, id="one row"),
    pytest.param(150, 16, 7, id="more row blocks than a group has"),
]


@pytest.fixture(autouse=True)
def _needs_tma(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no tensor memory accelerator")


def tile(device: str):
    from onlinequant_backend.kernels.nvidia.tuning import TMA, Tile

    return Tile(TMA, 128, 64, 128, 4, 3) if device == "cuda" else Tile(TMA, 16, 16, 32, 4, 2)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("M", "K", "N"), MATMULS)
def test_matches_the_reference(M, K, N, dtype, device):
    from onlinequant_backend.kernels.nvidia.matmul import matmul

    M, K, N = grow(device, M, K, N)
    operands = new_operands((M, K), (N, K), dtype, device)
    out = output_of(lambda out: matmul(*operands.arguments, out, tile(device)), (M, N), torch.float32, device)
    assert_near(out, operands.linear(), operands)


@pytest.mark.parametrize("out_dtype", OUTPUTS)
def test_output_dtypes_with_all_that_is_added(out_dtype, device):
    from onlinequant_backend.kernels.nvidia.matmul import matmul

    M, K, N = grow(device, 20, 32, 17)
    operands = new_operands((M, K), (N, K), torch.float8_e4m3fn, device, bias=out_dtype)
    residual = torch.randn(M, N, device=device).to(out_dtype)
    out = output_of(lambda out: matmul(*operands.arguments, out, tile(device), residual), (M, N), out_dtype, device)
    assert_near(out, operands.linear() + residual, operands)


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
def test_one_weight_scale_and_no_bias(dtype, geglu, device):
    from onlinequant_backend.kernels.nvidia.matmul import matmul

    M, K, N = grow(device, 20, 32, 18)
    operands = new_operands((M, K), (N, K), dtype, device, bias=None, scales=1)
    expected = operands.geglu() if geglu else operands.linear()
    out = output_of(
        lambda out: matmul(*operands.arguments, out, tile(device), geglu=geglu), expected.shape, torch.float32, device
    )
    assert_near(out, expected, operands)


@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_geglu(dtype, out_dtype, device):
    from onlinequant_backend.kernels.nvidia.matmul import matmul

    M, K, N = grow(device, 20, 48, 42)
    operands = new_operands((M, K), (N, K), dtype, device, bias=out_dtype)
    expected = operands.geglu()
    out = output_of(
        lambda out: matmul(*operands.arguments, out, tile(device), geglu=True), expected.shape, out_dtype, device
    )
    assert_near(out, expected, operands)


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
def test_8bit_output(dtype, geglu, device):
    from onlinequant_backend.kernels.nvidia.matmul import matmul

    M, K, N = grow(device, 40, 48, 42)
    operands = new_operands((M, K), (N, K), dtype, device)
    expected = operands.geglu() if geglu else operands.linear()
    # A range that clips the largest.
    scale = float(expected.abs().max()) / (127 if dtype is torch.int8 else 448) / 1.5
    out_qparams = torch.tensor([1 / scale, 0, scale], device=device)
    out = output_of(
        lambda out: matmul(*operands.arguments, out, tile(device), out_qparams=out_qparams, geglu=geglu),
        expected.shape,
        dtype,
        device,
    )
    assert_near_8bit(out, expected, out_qparams)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_product_that_is_not_finite_passes_for_no_number(dtype, device):
    from onlinequant_backend.kernels.nvidia.matmul import matmul

    if device != "cuda" and dtype is torch.float8_e4m3fn:
        pytest.skip("Triton's interpreter has no NaN in fp8")
    M, K, N = grow(device, 40, 48, 42)
    operands = new_operands((M, K), (N, K), dtype, device)
    operands.weight_scale[[1, 4]] = torch.tensor([torch.inf, torch.nan], device=device)
    out_qparams = torch.tensor([10.0, 0, 0.1], device=device)
    out = output_of(
        lambda out: matmul(*operands.arguments, out, tile(device), out_qparams=out_qparams), (M, N), dtype, device
    )
    lost = reference.dequantize(out, out_qparams).isnan().all(0)
    assert lost.nonzero().flatten().tolist() == [1, 4]


def test_cublas_takes_scales_at_any_address(device):
    from onlinequant_backend.kernels.nvidia.operators import run_linear
    from onlinequant_backend.kernels.nvidia.tuning import CUBLAS, Tile

    if device != "cuda":
        pytest.skip("cuBLAS is on GPUs alone")
    operands = new_operands((64, 64), (32, 64), torch.float8_e4m3fn, device, bias=torch.float16, scales=1)
    out = run_linear(operands.given, torch.float16, Tile(CUBLAS))
    assert operands.qparams[2].data_ptr() % 16
    assert_near(out, operands.linear(), operands)
