from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend import ops
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.passes import REWRITE
from onlinequant_backend.passes.merge_linears import merge_linears
from onlinequant_backend.passes.quantize_inputs import quantize_inputs
from onlinequant_backend.passes.rewrite_linear import rewrite_linear
from tests.helpers.graph_probe import EIGHT_BITS, SYMMETRIC, GraphProbe
from tests.helpers.tiny import noise, relative_error

SPLIT = torch.ops.aten.split_with_sizes.default
X = noise(2, 10, 32)
precisions = pytest.mark.parametrize("precision", SYMMETRIC, ids=lambda precision: precision.format.name)
Combine = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Attention(nn.Module):
    """Three linears of the same input, of different widths, and what ``combine`` makes of them."""

    def __init__(self, combine: Combine | None = None, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k = nn.Linear(32, 48, bias), nn.Linear(32, 48, bias)
        self.to_v = nn.Linear(32, 16, bias)
        self.combine = combine
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.combine is not None:
            return self.combine(self, x)
        return F.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))


def rewritten(module: nn.Module, *inputs: torch.Tensor, precision: Precision = SYMMETRIC[1]) -> GraphProbe:
    """A graph of 8-bit linears, before merging, that would have all of them merged."""
    probe = GraphProbe(module, *inputs, precision=precision).analyze()
    probe.run(quantize_inputs, rewrite_linear)
    probe.context.merge = lambda indices: True
    return probe


@precisions
@pytest.mark.parametrize("bias", [False, True])
def test_q_k_and_v_become_one_product(bias: bool, precision: Precision) -> None:
    module = Attention(bias=bias)
    probe = GraphProbe(module, X, precision=precision).analyze()
    layers = probe.observe()
    probe.run(quantize_inputs, rewrite_linear)
    (expected,) = probe.call_quantized(layers)

    assert probe.run(merge_linears) == {"merge_linears": 3}
    assert probe.added(ops.linear) == -2
    assert (probe.added(SPLIT), probe.added(operator.getitem)) == (1, 3)
    assert probe.added(torch.ops.aten.cat.default) == bias
    assert probe.added("placeholder") == 2 - 6
    merged = (0, 1, 2)
    assert probe.context.extra_inputs == [("qparams", 0), ("merged_weight", merged), ("merged_weight_scale", merged)]
    (split,) = probe.nodes(SPLIT)
    assert split.args[1:] == ([48, 48, 16], -1)
    (result,) = probe.call_quantized(layers)
    assert relative_error(result, expected) < 1e-4
    assert 0 < relative_error(result, module(X)) < 0.05
    probe.assert_settled(merge_linears)


def test_k_and_v_of_all_cross_attentions_become_one_product() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(self.attend), Attention(self.attend)
            self.out = nn.Linear(16, 32)

        def attend(self, attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
            text = self.text
            return F.scaled_dot_product_attention(attention.to_q(x), attention.to_k(text), attention.to_v(text))

        def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            self.text = text
            return self.second(x + self.out(self.first(x)))

    probe = rewritten(Blocks(), X, noise(2, 7, 32, seed=2))
    assert probe.run(merge_linears) == {"merge_linears": 4}
    assert (probe.added(ops.linear), probe.added(SPLIT)) == (-3, 1)
    indices = {info.name: info.index for info in probe.infos}
    merged = [of for what, of in probe.context.extra_inputs if what == "merged_weight"]
    assert len(merged) == 1
    assert len(merged[0]) == 4
    assert set(merged[0]).isdisjoint({indices.get("first.to_q"), indices.get("second.to_q"), indices.get("out")})


def some_bias(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    bias = x[0, 0, :1].expand(48) * 0 + module.to_k.weight[:, 0]
    return F.linear(x, module.to_q.weight, bias) + F.linear(x, module.to_k.weight, bias * 2)


def one_bias(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.to_q(x) + F.linear(x, module.to_k.weight, module.to_q.weight[:, 0].contiguous())


def two_dtypes(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        q = module.to_q(x)
    return q + module.to_k(x)


def changed_between(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x * 1
    q = module.to_q(x)
    x.add_(1)
    return q + module.to_k(x)


def returned(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.to_q(x), module.to_k(x)  # type: ignore[return-value]


def returned_as_a_view(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    q, k = (layer(x).view(2, 10, 4, 12).transpose(1, 2) for layer in (module.to_q, module.to_k))
    return q, k  # type: ignore[return-value]


@pytest.mark.parametrize(
    "combine",
    [
        pytest.param(lambda module, x: module.to_q(x) + module.to_k(x * 2), id="two inputs"),
        changed_between,
        two_dtypes,
        some_bias,
        one_bias,
        returned,
        returned_as_a_view,
    ],
)
def test_linears_that_do_not_fit_are_left_alone(combine: Combine) -> None:
    probe = rewritten(Attention(combine), X)
    assert len(probe.nodes(ops.linear)) == 2
    probe.assert_settled(merge_linears)


def test_linears_whose_weights_cannot_be_merged_are_left_alone() -> None:
    probe = rewritten(Attention(), X)
    asked: list[tuple[int, ...]] = []
    probe.context.merge = lambda indices: bool(asked.append(indices))
    probe.assert_settled(merge_linears)
    assert asked == [(0, 1, 2)]


def test_packed_weights_are_left_alone() -> None:
    probe = GraphProbe(Attention(), X, precision=EIGHT_BITS).analyze()
    probe.observe()
    probe.run(quantize_inputs, rewrite_linear)
    probe.assert_settled(merge_linears)


def test_single_linears_are_left_alone() -> None:
    probe = rewritten(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), noise(2, 8))
    probe.assert_settled(merge_linears)


@torch.no_grad()
@precisions
def test_views_and_changes_in_place_of_the_parts(precision: Precision) -> None:
    """The parts of a product are views with gaps, so there is not always a view of them."""

    def combine(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k = module.to_q(x), module.to_k(x)
        q.mul_(3)
        k += 1
        return q.view(-1) + k.view(2, 10, 4, 12).view(-1)

    module = Attention(combine)
    probe = GraphProbe(module, X, precision=precision).analyze()
    layers = probe.observe()
    changes = probe.run(*REWRITE)
    assert changes["merge_linears"] == 2
    (result,) = probe.call_quantized(layers)
    assert 0 < relative_error(result, module(X)) < 0.05


def test_merged_inputs_are_appended_after_those_of_other_layers() -> None:
    """What is dropped and what is kept must go together, in the order in which the inputs are handed over."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.attention, self.after = nn.Linear(32, 32), Attention(), nn.Linear(16, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(self.attention(self.before(x)))

    module = Mixed().requires_grad_(False)
    probe = GraphProbe(module, X, precision=SYMMETRIC[0]).analyze()
    layers = probe.observe()
    assert probe.run(*REWRITE)["merge_linears"] == 3
    kept = [(what, of) for what, of in probe.context.extra_inputs if isinstance(of, int) and what != "qparams"]
    assert kept == [(what, of) for of in (0, 4) for what in ("weight", "weight_scale")]
    (result,) = probe.call_quantized(layers)
    assert 0 < relative_error(result, module(X)) < 0.05
