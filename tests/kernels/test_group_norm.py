from __future__ import annotations

import pytest
import torch

from onlinequant_backend.kernels import reference
from tests.kernel_operands import FORMATS, OUTPUTS, assert_near_8bit, output_of

SHAPES = [
    # N, P, C, groups, programs
    pytest.param(2, 90, 320, 32, 2, id="groups of 10, a tail of pixels"),
    pytest.param(1, 150, 960, 32, 60, id="groups of 30, three chunks"),
    pytest.param(2, 200, 192, 3, 9, id="chunks of two blocks, the last one smaller"),
    pytest.param(1, 300, 30, 3, 1, id="few channels"),
    pytest.param(1, 70, 100, 1, 4, id="one group, a tail of channels"),
    pytest.param(3, 1, 8, 8, 8, id="one pixel, groups of one"),
]


def clipping(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``qparams`` whose range clips the largest values."""
    scale = float(y.abs().max()) / (127 if dtype is torch.int8 else 448) / 1.5
    return torch.tensor([1 / scale, 0, scale], device=y.device)


def check(x, groups, dtype, silu=False, affine=True, programs=None, eps=1e-5):
    """Compare the kernels' result for ``x`` [N, P, C] with the reference's."""
    from onlinequant_backend.kernels.group_norm import group_norm

    weight, bias = (torch.randn(2, x.shape[2]).to(x) + 0.5) if affine else (None, None)
    expected = reference.group_norm(x.movedim(-1, 1), groups, weight, bias, eps, silu).movedim(1, -1)
    qparams = clipping(expected, dtype)
    out = output_of(
        lambda out: group_norm(x, groups, weight, bias, eps, silu, qparams, out, programs),
        x.shape,
        dtype,
        str(x.device),
    )
    assert_near_8bit(out, expected, qparams)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("N", "P", "C", "groups", "programs"), SHAPES)
def test_matches_the_reference(N, P, C, groups, programs, dtype, silu, device):
    torch.manual_seed(0)
    x = torch.randn(N, P, C, device=device) * torch.rand(C, device=device) + torch.randn(C, device=device)
    check(x, groups, dtype, silu, programs=programs)


@pytest.mark.parametrize("x_dtype", OUTPUTS)
@pytest.mark.parametrize("affine", [False, True])
def test_input_dtypes(x_dtype, affine, device):
    torch.manual_seed(0)
    x = (torch.randn(1, 90, 80, device=device) + 3).to(x_dtype)
    check(x, 8, torch.int8, silu=True, affine=affine)


@pytest.mark.parametrize("programs", [1, 4])
def test_mean_far_from_zero_costs_no_precision(programs, device):
    torch.manual_seed(0)
    x = torch.randn(1, 500, 60, device=device) + 1000
    x[:, 0] = -3000  # not even where the first pixel lies far off
    check(x, 2, torch.int8, programs=programs)


def test_equal_values_become_the_bias(device):
    from onlinequant_backend.kernels.group_norm import group_norm

    x = torch.full((1, 50, 64), 7.0, device=device)
    bias = torch.arange(64.0, device=device)
    qparams = torch.tensor([1.0, 0.0, 1.0], device=device)
    out = torch.empty(x.shape, dtype=torch.int8, device=device)
    group_norm(x, 4, None, bias, 1e-5, False, qparams, out)
    assert torch.equal(out, bias.to(torch.int8).expand_as(out))


def test_whole_gpu_and_one_program_agree(device):
    if device != "cuda":
        pytest.skip("there is no GPU to fill")
    torch.manual_seed(0)
    for shape in ((2, 128 * 128, 960), (1, 64 * 64, 640), (2, 32 * 32, 2560), (1, 1000, 1920)):
        check(torch.randn(shape, device=device).half(), 32, torch.float8_e4m3fn, silu=True)
