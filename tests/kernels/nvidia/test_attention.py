"""Attention in 8 bit against float64."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from onlinequant_backend.kernels import emulated, formats, reference
from tests.helpers import exact_floats
from tests.helpers.attention_operands import error, operands
from tests.helpers.kernel_operands import grow, output_of

# Relative errors of attention whose weights are far from equal, as those of trained models are.
BOUNDS = {"fp8": 0.03, "int8": 0.008}
SIZES = [40, 64, 80, 96, 128, 160]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="there is no triton: pip install --no-deps triton")
    exact_floats.install(monkeypatch)


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, format: str, kernel: str = "gather") -> torch.Tensor:
    """What the kernel writes, [batch, heads, queries, size]."""
    from onlinequant_backend.kernels.nvidia.attention import attention
    from onlinequant_backend.kernels.nvidia.tuning import Tile

    device = q.device.type
    if device == "cuda":
        needed = (9, 0) if kernel == "tma" else (8, 9) if format == "fp8" else (8, 0)
        if torch.cuda.get_device_capability() < needed:
            pytest.skip("this GPU cannot run it")
    tile = Tile(kernel, 64, 64, 0, 4, 3) if device == "cuda" else Tile(kernel, 16, 32, 0, 4, 2)
    batch, heads, queries, size = q.shape
    scale, dtype = 1 / math.sqrt(size), formats.attention_dtype(format)
    shape = (batch, queries, heads, size)
    return output_of(lambda out: attention(q, k, v, scale, dtype, out, tile), shape, q.dtype, device).transpose(1, 2)


def test_the_operands_are_told_apart() -> None:
    """Averages of all values would be near to anything."""
    q, k, v = operands(37, 75, 64, "cpu")
    weights = torch.softmax(q.double() @ k.double().mT / 8, -1)
    assert float(weights.amax(-1).mean()) > 5 / 75
    assert error(v.mean(2, keepdim=True).expand_as(q), q, k, v) > 0.5


@pytest.mark.parametrize("kernel", ["gather", "tma"])
@pytest.mark.parametrize("format", BOUNDS)
@pytest.mark.parametrize("size", SIZES)
def test_all_head_sizes(size, format, kernel, device):
    q, k, v = operands(*grow(device, 20, 40), size, device)
    assert error(run(q, k, v, format, kernel), q, k, v) < BOUNDS[format]


@pytest.mark.parametrize("kernel", ["gather", "tma"])
@pytest.mark.parametrize("format", BOUNDS)
@pytest.mark.parametrize(("queries", "tokens"), [(16, 64), (33, 31), (1, 1), (5, 97)])
def test_tails(queries, tokens, format, kernel, device):
    q, k, v = operands(*grow(device, queries, tokens), 64, device, torch.bfloat16)
    assert error(run(q, k, v, format, kernel), q, k, v) < BOUNDS[format]


@pytest.mark.parametrize("kernel", ["gather", "tma"])
@pytest.mark.parametrize("format", BOUNDS)
def test_what_lies_beyond_the_last_token_does_not_count(format, kernel, device):
    q, k, v = operands(7, 64, 64, device)
    for x, beyond in ((k, 30.0), (v, float("nan"))):
        x[:, :, 41:] = beyond
    short = (q, k[:, :, :41], v[:, :, :41])
    assert error(run(*short, format, kernel), *short) < BOUNDS[format]
    for_all = (torch.zeros_like(q), *short[1:])  # of equal weights, each more would show
    assert error(run(*for_all, format, kernel), *for_all) < BOUNDS[format]


@pytest.mark.parametrize("kernel", ["gather", "tma"])
@pytest.mark.parametrize("format", BOUNDS)
def test_other_strides(format, kernel, device):
    """Contiguous ones, parts of one tensor at odd addresses, and heads that are repeated."""
    q, k, v = operands(19, 40, 64, device)
    expected = run(q, k, v, format, kernel)
    assert torch.equal(run(q.contiguous(), k.contiguous(), v.contiguous(), format, kernel), expected)
    odd = [F.pad(x, (3, 2))[..., 3:-2] for x in (q, k, v)]
    assert torch.equal(run(*odd, format, kernel), expected)
    repeated = (q, *(x[:, :1].expand(-1, 3, -1, -1) for x in (k, v)))
    assert torch.equal(run(*repeated, format, kernel)[:, 0], expected[:, 0])


@pytest.mark.parametrize("format", BOUNDS)
def test_without_their_mean_outliers_of_keys_do_no_harm(format, device):
    """Channels in which all keys are large: rounding these costs more than all else."""
    q, k, v = operands(40, 90, 64, device, outliers=30)
    rounded_keys = emulated._rounded(k.float(), formats.attention_dtype(format), (32, 64))
    with_their_mean = error(reference.attention(q, rounded_keys, v, 1 / 8), q, k, v)
    without = error(run(q, k, v, format), q, k, v)
    assert without < BOUNDS[format]
    assert with_their_mean > 2 * BOUNDS[format], (with_their_mean, without)


@pytest.mark.parametrize("format", BOUNDS)
def test_blocks_of_values_have_scales_of_their_own(format, device):
    """Also one of zeros, whose weights count all the same."""
    q, k, v = operands(8, 128, 64, device)
    v[:, :, 32:64] = 0
    v[:, :, 64:96] *= 1e-4
    v[:, :, 96:] *= 100
    assert error(run(q, k, v, format), q, k, v) < 2 * BOUNDS[format]  # few values are all that is large
    v[:, :, 96:] = 0
    assert error(run(q, k, v, format), q, k, v) < 2 * BOUNDS[format]


@pytest.mark.parametrize("format", BOUNDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_not_finite_stays_so(place, value, format, device):
    q, k, v = given = operands(18, 40, 64, device)
    {"q": q, "k": k, "v": v}[place][1, 2, 5, 7] = value
    out, plain = run(*given, format), reference.attention(*given, 1 / 8)
    assert bool((~out.isfinite())[~plain.isfinite()].all())
    assert bool((~plain.isfinite()).any())
    assert bool(out[0].isfinite().all()) and bool(out[1, :2].isfinite().all())
    assert not bool(out[1, 2, 5].isfinite().any()) or (place == "v" and format == "int8")


@pytest.mark.parametrize("format", BOUNDS)
def test_zeros(format, device):
    q, k, v = operands(18, 40, 64, device)
    assert not bool(run(q, k, torch.zeros_like(v), format).any())
    average = run(torch.zeros_like(q), k, v, format)
    torch.testing.assert_close(average, v.mean(2, keepdim=True).expand_as(q), rtol=0, atol=0.02)


@pytest.mark.parametrize(("queries", "tokens"), [(20, 20), (20, 70), (70, 20)])
def test_the_operator_takes_the_short_kernel_for_few_tokens(queries, tokens, device, monkeypatch):
    from onlinequant_backend.kernels.nvidia import operators, short_attention

    is_short, seen = max(queries, tokens) <= short_attention.LONGEST, []
    plain = short_attention.short_attention
    monkeypatch.setattr(short_attention, "short_attention", lambda *args: (seen.append(1), plain(*args)))
    q, k, v = operands(queries, tokens, 64, device)
    y = operators.attention(q, k, v, 1 / 8, "int8")
    assert len(seen) == is_short
    assert y.transpose(1, 2).is_contiguous()
    assert error(y, q, k, v) < (0.001 if is_short else BOUNDS["int8"])
    strided = (x.mT.contiguous().mT for x in (q, k, v))
    assert torch.equal(operators.attention(*strided, 1 / 8, "int8"), y)


def test_the_operator_of_nothing(device):
    from onlinequant_backend.kernels.nvidia import operators

    q, k, v = operands(20, 20, 64, device)
    assert not bool(operators.attention(q, k[:, :, :0], v[:, :, :0], 1 / 8, "int8").any())
    assert operators.attention(q[:, :, :0], k, v, 1 / 8, "int8").shape == (2, 3, 0, 64)
    with pytest.raises(ValueError, match="at most 256, and these are of 264"):
        operators.attention(*operands(4, 4, 264, device), 1 / 8, "int8")


def test_values_have_a_descriptor_only_where_all_rows_are_aligned(device):
    from onlinequant_backend.kernels.nvidia.attention import _has_descriptor

    v = torch.zeros(2, 40, 3, 72, dtype=torch.float16, device=device).transpose(1, 2)
    assert _has_descriptor(v) and _has_descriptor(v[..., 8:])
    assert not any(map(_has_descriptor, (v[..., 3:], F.pad(v, (0, 3))[..., :-3], v[:, :1].expand(2, 3, 40, 72))))


def test_parts_of_heads():
    from onlinequant_backend.kernels.nvidia.attention import parts_of

    assert [parts_of(size) for size in (8, 32, 40, 64, 120, 128, 256)] == [
        *((32, 0), (32, 0), (64, 0), (64, 0), (128, 0), (128, 0), (256, 0))
    ]
    assert [parts_of(size) for size in (72, 80, 96, 160)] == [(64, 32), (64, 32), (64, 32), (128, 32)]


CAPABILITIES = ("8.0", "8.6", "8.9", "9.0")


@pytest.mark.slow
def test_default_tiles_need_no_more_than_a_gpu_has(tmp_path):
    """Registers, shared memory and nothing spilled, by compiling for GPUs that need not be there."""
    script = Path(__file__).with_name("compile_attention.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(script), *CAPABILITIES], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(run.stdout)
    kilobytes = {"8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227}
    cases = {(capability, format, size) for capability, format, size, *_ in found}
    both = set(itertools.product(("8.9", "9.0"), BOUNDS, SIZES))
    assert cases == both | set(itertools.product(("8.0", "8.6"), ["int8"], SIZES))
    for capability, *case, kernel, warps, registers, spilled, shared in found:
        assert spilled == 0, (capability, *case, kernel)
        assert registers <= min(255, 65536 // (32 * warps)), (capability, *case, kernel)
        assert shared <= 1024 * kilobytes[capability], (capability, *case, kernel)
