from __future__ import annotations

import pytest
import torch

from onlinequant_backend.kernels import reference
from tests.helpers.kernel_operands import FORMATS, OUTPUTS, assert_near_8bit, output_of

H200 = 132  # multiprocessors
SHAPES = [
    # N, P, C, groups, programs of the three kernels; None: one kernel
    pytest.param(2, 90, 320, 32, None, id="one kernel, groups of 8 + 2, padded pixels"),
    pytest.param(1, 129, 93, 3, None, id="one kernel, groups of 16 + 15, half of the pixels are padding"),
    pytest.param(2, 64, 32, 4, None, id="one kernel, nothing is padding"),
    pytest.param(1, 70, 100, 1, None, id="one kernel, one group"),
    pytest.param(3, 1, 8, 8, None, id="one kernel, one pixel, groups of one"),
    pytest.param(2, 90, 320, 32, 2, id="groups of 10, a tail of pixels"),
    pytest.param(1, 150, 960, 32, 60, id="groups of 30, three chunks"),
    pytest.param(2, 200, 192, 3, 9, id="chunks of two blocks, the last one smaller"),
    pytest.param(1, 300, 30, 3, 1, id="few channels"),
    pytest.param(1, 70, 100, 1, 4, id="one group, a tail of channels"),
    pytest.param(3, 1, 8, 8, 8, id="one pixel, groups of one"),
]
BOTH = pytest.mark.parametrize("programs", [pytest.param(None, id="one kernel"), pytest.param(2, id="three kernels")])


def clipping(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``qparams`` whose range clips the largest values."""
    scale = float(y.abs().max()) / (127 if dtype is torch.int8 else 448) / 1.5
    return torch.tensor([1 / scale, 0, scale], device=y.device)


def run(programs, *args):
    """The one kernel, or with ``programs`` the three, whichever ``group_norm`` would choose."""
    from onlinequant_backend.kernels.nvidia.group_norm import three_kernels
    from onlinequant_backend.kernels.nvidia.group_norm_in_registers import one_kernel

    if programs is None:
        one_kernel(*args)
    else:
        three_kernels(*args, programs=programs)


def check(x, groups, dtype, programs, silu=False, affine=(True, True), eps=1e-5):
    """Compare the kernels' result for ``x`` [N, P, C] with the reference's; ``affine``: whether by weight, by bias."""
    weight, bias = (torch.randn(x.shape[2]).to(x) + 0.5 if there else None for there in affine)
    expected = reference.group_norm(x.movedim(-1, 1), groups, weight, bias, eps, silu).movedim(1, -1)
    qparams = clipping(expected, dtype)
    out = output_of(
        lambda out: run(programs, x, groups, weight, bias, eps, silu, qparams, out), x.shape, dtype, str(x.device)
    )
    assert_near_8bit(out, expected, qparams)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("N", "P", "C", "groups", "programs"), SHAPES)
def test_matches_the_reference(N, P, C, groups, programs, dtype, device):
    """With SiLU in fp8, without in int8: it comes before the dtype, and the interpreter is slow."""
    torch.manual_seed(0)
    x = torch.randn(N, P, C, device=device) * torch.rand(C, device=device) + torch.randn(C, device=device)
    check(x, groups, dtype, programs, silu=dtype is torch.float8_e4m3fn)


@BOTH
@pytest.mark.parametrize("x_dtype", OUTPUTS)
@pytest.mark.parametrize("affine", [(False, False), (True, False), (False, True), (True, True)])
def test_input_dtypes(x_dtype, affine, programs, device):
    torch.manual_seed(0)
    x = (torch.randn(1, 90, 80, device=device) + 3).to(x_dtype)
    check(x, 8, torch.int8, programs, silu=True, affine=affine)


@pytest.mark.parametrize("programs", [None, 1, 4])
@pytest.mark.parametrize("first", [3000, -1000])  # not even where the first pixel lies far off
def test_mean_far_from_zero_costs_no_precision(first, programs, device):
    torch.manual_seed(0)
    x = torch.randn(1, 500, 60, device=device) + 3000
    x[:, 0] = first
    check(x, 2, torch.int8, programs)


@BOTH
def test_small_values_stay_small(programs, device):
    torch.manual_seed(0)
    check(torch.randn(1, 50, 40, device=device) / 1000, 2, torch.int8, programs)  # of a variance far below eps


@BOTH
def test_equal_values_become_the_bias(programs, device):
    x = torch.full((1, 50, 64), 7.0, device=device)
    bias = torch.arange(64.0, device=device)
    qparams = torch.tensor([1.0, 0.0, 1.0], device=device)
    out = torch.empty(x.shape, dtype=torch.int8, device=device)
    run(programs, x, 4, None, bias, 1e-5, False, qparams, out)
    assert torch.equal(out, bias.to(torch.int8).expand_as(out))


@pytest.mark.parametrize(
    ("shape", "groups", "fits"),
    [
        # SD1.5
        ((2, 4096, 320), 32, False),
        ((8, 1024, 640), 32, True),
        ((8, 1024, 960), 32, True),
        ((2, 1024, 1280), 32, True),  # the largest: 32 + 8 channels
        ((8, 1024, 1280), 32, True),  # in two turns
        ((16, 1024, 1280), 32, False),  # in four
        ((2, 1024, 1920), 32, False),
        ((8, 256, 2560), 32, True),
        ((8, 64, 1280), 32, True),
        # SDXL
        ((2, 16384, 320), 32, False),
        ((2, 4096, 1920), 32, False),
        ((2, 1024, 2560), 32, False),
        # It is the padded size that counts.
        ((1, 1025, 64), 8, False),
        ((1, 513, 1280), 32, True),
        ((1, 1024, 1312), 32, False),  # 32 + 16 channels
        ((1, 64, 640), 1, True),
        ((1, 64, 641), 1, False),
        # Few programs are fast enough as long as they are small, many small ones are too many.
        ((1, 1024, 10), 1, True),
        ((1000, 64, 1280), 32, False),
    ],
)
def test_fits_one_kernel(shape, groups, fits):
    pytest.importorskip("triton")
    from onlinequant_backend.kernels.nvidia.group_norm_in_registers import fits_one_kernel

    assert fits_one_kernel(shape, groups, H200) is fits


@pytest.mark.parametrize(("pixels", "taken"), [(1024, "one_kernel"), (1025, "three_kernels")])
def test_takes_what_fits(pixels, taken, monkeypatch):
    pytest.importorskip("triton")
    from onlinequant_backend.kernels.nvidia import group_norm

    calls = []
    for name in ("one_kernel", "three_kernels"):
        monkeypatch.setattr(group_norm, name, lambda *args, name=name: calls.append((name, args)))
    x = torch.empty(1, pixels, 10)
    args = (x, 1, None, None, 1e-5, True, torch.ones(3), torch.empty(x.shape, dtype=torch.int8))
    group_norm.group_norm(*args)
    assert calls == [(taken, args)]


def test_sizes_of_a_gpu(device):
    from onlinequant_backend.kernels.nvidia.group_norm_in_registers import fits_one_kernel

    if device != "cuda":
        pytest.skip("takes the interpreter too long")
    torch.manual_seed(0)
    for shape in (
        (2, 4096, 320),
        (2, 1024, 640),
        (8, 1024, 960),
        (3, 256, 2560),
        (2, 144, 1280),
        (2, 128 * 128, 960),
        (1, 64 * 64, 640),
        (1, 1000, 1920),
    ):
        x = torch.randn(shape, device=device).half()
        check(x, 32, torch.float8_e4m3fn, 4 * H200, silu=True)
        if fits_one_kernel(shape, 32, H200):
            check(x, 32, torch.float8_e4m3fn, None, silu=True)
