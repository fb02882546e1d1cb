from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend import ops
from onlinequant_backend.kernels.nvidia import gpu, provider
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.passes.drop_identities import drop_identities
from onlinequant_backend.passes.fuse_geglu import fuse_geglu
from onlinequant_backend.passes.quantize_inputs import quantize_inputs
from onlinequant_backend.passes.rewrite_linear import rewrite_linear
from tests.helpers.graph_probe import EIGHT_BITS, SYMMETRIC, GraphProbe
from tests.helpers.tiny import noise, relative_error

X = noise(2, 10, 32)
Combine = Callable[[torch.Tensor], torch.Tensor]
precisions = pytest.mark.parametrize("precision", SYMMETRIC, ids=lambda precision: precision.format.name)


def geglu(y: torch.Tensor) -> torch.Tensor:
    value, gate = y.chunk(2, dim=-1)
    return value * F.gelu(gate)


class FeedForward(nn.Module):
    """A wide linear, what ``combine`` makes of it, and what reads that: a linear, if anything."""

    def __init__(self, combine: Combine = geglu, bias: bool = True, out: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(32, 96, bias)
        self.out = nn.Linear(48, 32) if out else nn.Identity()
        self.combine = combine
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.combine(self.wide(x)))


def rewritten(
    module: nn.Module, x: torch.Tensor = X, precision: Precision = SYMMETRIC[1], **options: Any
) -> GraphProbe:
    """A graph of 8-bit linears, before fusing."""
    probe = GraphProbe(module, x, precision=precision, **options).analyze()
    probe.run(quantize_inputs, rewrite_linear)
    return probe


def halves_by_function(y: torch.Tensor) -> torch.Tensor:
    value, gate = torch.chunk(y, 2, y.dim() - 1)
    return torch.mul(F.gelu(gate, approximate="none"), value)


def in_place(y: torch.Tensor) -> torch.Tensor:
    value, gate = y.chunk(2, dim=-1)
    value *= F.gelu(gate)
    return value


def with_dropout(y: torch.Tensor) -> torch.Tensor:
    return F.dropout(geglu(y), 0.5, training=False)


@precisions
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("combine", [geglu, halves_by_function, in_place, with_dropout])
def test_geglu_and_the_next_layers_quantize_become_one_op(combine: Combine, bias: bool, precision: Precision) -> None:
    module = FeedForward(combine, bias)
    probe = GraphProbe(module, X, precision=precision).analyze()
    layers = probe.observe()
    probe.run(quantize_inputs, rewrite_linear, drop_identities)
    (expected,) = probe.call_quantized(layers)

    assert probe.run(fuse_geglu) == {"fuse_geglu": 1}
    counts = probe.after.counts
    kept = {ops.quantize: 1, ops.geglu: 1, ops.linear: 1}
    assert {target: count for target, count in counts.items() if target != "placeholder"} == kept
    (node,) = probe.nodes(ops.geglu)
    assert [str(arg) for arg in node.args[-2:]] == ["onlinequant_qparams_1", str(precision.format.activation)]
    (result,) = probe.call_quantized(layers)
    assert relative_error(result, expected) < 0.01  # what lies between two steps may go to either
    assert 0 < relative_error(result, module(X)) < 0.05
    probe.assert_settled(fuse_geglu)


@precisions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_that_others_read_is_not_quantized(dtype: torch.dtype, precision: Precision) -> None:
    module = FeedForward(out=False).to(dtype)
    x = X.to(dtype)
    probe = GraphProbe(module, x, precision=precision).analyze()
    layers = probe.observe()
    probe.run(quantize_inputs, rewrite_linear, drop_identities)
    (expected,) = probe.call_quantized(layers)
    assert probe.run(fuse_geglu) == {"fuse_geglu": 1}
    (node,) = probe.nodes(ops.geglu)
    assert node.args[-2:] == (None, dtype)
    (result,) = probe.call_quantized(layers)
    assert result.dtype is dtype
    assert relative_error(result, expected) < (1e-6 if dtype is torch.float32 else 0.01)


def test_result_that_is_quantized_and_read_stays_float() -> None:
    class Both(FeedForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.combine(self.wide(x))
            return hidden[..., :32] + self.out(hidden)

    probe = rewritten(Both())
    assert probe.run(fuse_geglu) == {"fuse_geglu": 1}
    assert probe.added(ops.quantize) == 0
    assert probe.nodes(ops.geglu)[0].args[-2:] == (None, torch.float32)


def tanh(y: torch.Tensor) -> torch.Tensor:
    value, gate = y.chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="tanh")


def silu(y: torch.Tensor) -> torch.Tensor:
    value, gate = y.chunk(2, dim=-1)
    return value * F.silu(gate)


def gelu_of_the_first(y: torch.Tensor) -> torch.Tensor:
    gate, value = y.chunk(2, dim=-1)
    return value * F.gelu(gate)


def of_another_dimension(y: torch.Tensor) -> torch.Tensor:
    value, gate = y.chunk(2, dim=1)
    return value * F.gelu(gate)


def of_three(y: torch.Tensor) -> torch.Tensor:
    value, gate, rest = y.chunk(3, dim=-1)
    return value * F.gelu(gate) + rest


def value_read_twice(y: torch.Tensor) -> torch.Tensor:
    value, gate = y.chunk(2, dim=-1)
    return value * F.gelu(gate) + value


def gate_read_twice(y: torch.Tensor) -> torch.Tensor:
    value, gate = y.chunk(2, dim=-1)
    return value * F.gelu(gate) + gate


def gelu_read_twice(y: torch.Tensor) -> torch.Tensor:
    value, gate = y.chunk(2, dim=-1)
    gelu = F.gelu(gate)
    return value * gelu + gelu


def wide_read_twice(y: torch.Tensor) -> torch.Tensor:
    return geglu(y) + y[..., 48:]


def sum_of_both(y: torch.Tensor) -> torch.Tensor:
    value, gate = y.chunk(2, dim=-1)
    return value + F.gelu(gate)


def gelu_alone(y: torch.Tensor) -> torch.Tensor:
    _, gate = y.chunk(2, dim=-1)
    return F.gelu(gate) * 2


@pytest.mark.parametrize(
    "combine",
    [
        tanh,
        silu,
        gelu_of_the_first,
        of_another_dimension,
        of_three,
        value_read_twice,
        gate_read_twice,
        gelu_read_twice,
        wide_read_twice,
        sum_of_both,
        gelu_alone,
    ],
)
def test_what_differs_is_left_alone(combine: Combine) -> None:
    probe = rewritten(FeedForward(combine, out=False))
    assert len(probe.nodes(ops.linear)) == 1
    probe.assert_settled(fuse_geglu)


def test_dropout_that_drops_stays() -> None:
    probe = rewritten(FeedForward(lambda y: F.dropout(geglu(y), 0.5, training=True)))
    assert probe.run(fuse_geglu) == {"fuse_geglu": 1}
    assert len(probe.nodes(F.dropout)) == 1
    assert probe.nodes(ops.geglu)[0].args[-2] is None


def test_float_linear_and_packed_weights_are_left_alone() -> None:
    rewritten(FeedForward(), exclude=("*",)).assert_settled(fuse_geglu)
    rewritten(FeedForward(), precision=EIGHT_BITS).assert_settled(fuse_geglu)


@pytest.mark.parametrize(("has_tma", "inputs", "fused"), [(True, 32, 1), (True, 24, 0), (False, 32, 0)])
def test_shapes_without_a_kernel_are_left_alone(
    has_tma: bool, inputs: int, fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose second GPU, the one that is meant, may have a tensor memory accelerator."""
    gpus = {index: gpu.NONE._replace(has_tma=has_tma == (index == 1)) for index in range(2)}
    monkeypatch.setattr(provider, "gpu_of", lambda device: gpus[device.index])
    module = FeedForward()
    module.wide = nn.Linear(inputs, 96)
    probe = rewritten(module, X[..., :inputs])
    probe.context.device = torch.device("cuda", 1)
    assert probe.run(fuse_geglu) == {"fuse_geglu": fused}
    if not fused:
        assert probe.after == probe.before
