from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onlinequant_backend.kernels import reference
from tests.helpers.kernel_operands import FORMATS, OUTPUTS, assert_near_8bit, output_of


def qparams_for(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of a range that clips the largest values."""
    scale = float(y.abs().max()) / (127 if dtype is torch.int8 else 448) / 1.5
    return torch.tensor([1 / scale, 0, scale], device=y.device)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "channels"), [(5, 64), (3, 40), (2, 1280)])
def test_matches_float64(rows, channels, dtype, with_residual, affine, device):
    from onlinequant_backend.kernels.nvidia.layer_norm import layer_norm

    torch.manual_seed(0)
    x = torch.randn(rows, channels, device=device) + 3
    residual = torch.randn(rows, channels, device=device) if with_residual else None
    weight, bias = torch.randn(2, channels, device=device) if affine else (None, None)
    total = x if residual is None else x + residual
    doubles = (None if tensor is None else tensor.double() for tensor in (weight, bias))
    expected = F.layer_norm(total.double(), (channels,), *doubles, 1e-5)
    qparams = qparams_for(expected, dtype)
    written = torch.empty_like(x) if with_residual else None
    out = output_of(
        lambda out: layer_norm(x, residual, written, weight, bias, 1e-5, qparams, out), x.shape, dtype, device
    )
    assert_near_8bit(out, expected, qparams)
    assert written is None or torch.equal(written, total)


@pytest.mark.parametrize("dtype", OUTPUTS)
def test_sum_is_rounded_before_it_is_normalized(dtype, device):
    from onlinequant_backend.kernels.nvidia.layer_norm import layer_norm

    torch.manual_seed(0)
    x, residual = (torch.randn(2, 4, 96, device=device) * 30).to(dtype)
    total = torch.empty_like(x)
    qparams = qparams_for(F.layer_norm((x + residual).double(), (96,)), torch.int8)
    out = output_of(
        lambda out: layer_norm(x, residual, total, None, None, 1e-5, qparams, out), x.shape, torch.int8, device
    )
    # Triton's interpreter cuts bfloat16 off instead of rounding it.
    rtol = 2**-7 if dtype is torch.bfloat16 and device != "cuda" else 0
    torch.testing.assert_close(total, x + residual, rtol=rtol, atol=0)
    assert_near_8bit(out, F.layer_norm(total.double(), (96,)), qparams)


@pytest.mark.parametrize("first", [3000.0, -1e6])
def test_far_from_zero(first, device):
    """Whether all values are or only the one that the others are taken relative to."""
    from onlinequant_backend.kernels.nvidia.layer_norm import layer_norm

    torch.manual_seed(0)
    x = torch.randn(5, 640, device=device) + 3000
    x[:, 0] = first
    expected = F.layer_norm(x.double(), (640,), eps=1e-5)
    qparams = qparams_for(expected, torch.int8)
    run = lambda out: layer_norm(x, None, None, None, None, 1e-5, qparams, out)  # noqa: E731
    assert_near_8bit(output_of(run, x.shape, torch.int8, device), expected, qparams)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_not_finite_passes_for_no_number(dtype, value, device):
    from onlinequant_backend.kernels.nvidia.layer_norm import layer_norm

    if device != "cuda" and dtype is torch.float8_e4m3fn:
        pytest.skip("Triton's interpreter has no NaN in fp8")
    x = torch.randn(3, 64, device=device)
    x[1, 5] = value
    qparams = torch.tensor([50.0, 0, 0.02], device=device)
    out = output_of(lambda out: layer_norm(x, None, None, None, None, 1e-5, qparams, out), x.shape, dtype, device)
    assert reference.dequantize(out, qparams).isnan().all(1).tolist() == [False, True, False]
