"""Attention over a few tokens against float64."""

from __future__ import annotations

import math

import pytest
import torch

from onlinequant_backend.kernels import reference
from tests.helpers import exact_floats
from tests.helpers.kernel_operands import output_of

DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")]
BOUNDS = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="there is no triton: pip install --no-deps triton")
    exact_floats.install(monkeypatch)


def operands(batch, queries, tokens, size, dtype, device):
    """[batch, 3, tokens, size], as a linear layer gives them."""
    torch.manual_seed(0)
    return [
        (2 * torch.randn(batch, rows, 3, size)).to(device, dtype).transpose(1, 2) for rows in (queries, tokens, tokens)
    ]


def run(q, k, v, scale):
    from onlinequant_backend.kernels.nvidia.short_attention import short_attention

    batch, heads, queries, size = q.shape
    shape = (batch, queries, heads, size)
    out = output_of(lambda out: short_attention(q, k, v, scale, out), shape, q.dtype, q.device.type)
    return out.transpose(1, 2)


def assert_near(out, q, k, v, scale):
    expected = reference.attention(q, k, v, scale)
    assert float((out.double() - expected).norm() / expected.norm()) < BOUNDS[q.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [40, 64, 80, 96, 128, 160])
def test_all_head_sizes(size, dtype, device):
    q, k, v = operands(2, 25, 25, size, dtype, device)
    assert_near(run(q, k, v, 0.1), q, k, v, 0.1)


@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (16, 16), (17, 33), (64, 64), (3, 64), (64, 5)])
def test_all_lengths(queries, tokens, device):
    q, k, v = operands(3, queries, tokens, 32, torch.float16, device)
    assert_near(run(q, k, v, 1 / math.sqrt(32)), q, k, v, 1 / math.sqrt(32))


@pytest.mark.parametrize("batch", [1, 5, 20])
def test_any_number_of_sequences(batch, device):
    """A program has several, the last one fewer."""
    q, k, v = operands(batch, 4, 9, 16, torch.float16, device)
    assert_near(run(q, k, v, 0.3), q, k, v, 0.3)


def test_other_strides(device):
    q, k, v = operands(3, 9, 12, 40, torch.float16, device)
    expected = run(q, k, v, 0.2)
    assert torch.equal(run(*(x.contiguous() for x in (q, k, v)), 0.2), expected)
    parts = torch.zeros(3, 12, 3, 3, 40, dtype=q.dtype, device=device)
    for part, x in zip(parts.unbind(2), (q, k, v), strict=True):
        part[:, : x.shape[2]] = x.transpose(1, 2)
    together = [part.transpose(1, 2) for part in parts.unbind(2)]
    assert torch.equal(run(together[0][:, :, :9], *together[1:], 0.2), expected)


def test_what_lies_beyond_the_last_token_does_not_count(device):
    q, k, v = operands(2, 9, 16, 32, torch.float16, device)
    k[:, :, 11:], v[:, :, 11:] = 50, float("nan")
    short = (q, k[:, :, :11], v[:, :, :11])
    assert_near(run(*short, 0.2), *short, 0.2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_not_finite_stays_so_where_it_was(place, value, device):
    q, k, v = given = operands(2, 9, 9, 32, torch.float16, device)
    {"q": q, "k": k, "v": v}[place][1, 2, 5, 7] = value
    out, plain = run(*given, 0.2), reference.attention(*given, 0.2)
    assert torch.equal(out.isfinite(), plain.isfinite())
    assert not bool(out.isfinite().all())
