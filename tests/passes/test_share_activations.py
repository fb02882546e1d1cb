from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend import ops
from onlinequant_backend.passes.merge_linears import merge_linears
from onlinequant_backend.passes.quantize_inputs import quantize_inputs
from onlinequant_backend.passes.rewrite_linear import rewrite_linear
from onlinequant_backend.passes.share_activations import share_activations
from tests.helpers.graph_probe import SYMMETRIC, GraphProbe
from tests.helpers.tiny import noise

X = noise(2, 32)
# What a value may be written through, without any node that is called after it.
VIEWS = (
    *(lambda x: x.view(-1), lambda x: x[:, :2], lambda x: x.chunk(2, -1)[1], lambda x: x.detach(), lambda x: x.t()),
    *(lambda x: F.dropout(x, training=False), lambda x: x.as_strided((2,), (1,)), lambda x: x.to(torch.float32)),
)


class Blocks(nn.Module):
    """Two projections of one embedding, each after an activation of its own, as residual blocks have them."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = F.silu) -> None:
        super().__init__()
        self.activation = activation
        self.first, self.second = nn.Linear(32, 16), nn.Linear(32, 48)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(self.activation(x)), self.second(self.activation(x))], -1)


@pytest.mark.parametrize("activation", [F.silu, F.gelu, torch.sigmoid, lambda x: F.silu(x, inplace=False)])
def test_equal_activations_are_computed_once(activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Blocks(activation)
    probe = GraphProbe(model, X)
    assert probe.run(share_activations) == {"share_activations": 1}
    assert sum(probe.after.counts.values()) == sum(probe.before.counts.values()) - 1
    assert torch.equal(probe.call()[0], model(X))
    probe.assert_settled(share_activations)


def test_their_readers_become_one_product() -> None:
    probe = GraphProbe(Blocks(), X, precision=SYMMETRIC[1]).analyze()
    probe.observe()
    probe.run(quantize_inputs, rewrite_linear, merge_linears)
    assert len(probe.nodes(ops.linear)) == len(probe.nodes(ops.quantize)) == 1


def written_before(x: torch.Tensor) -> torch.Tensor:
    first = F.silu(x)
    x.add_(1)
    return first + F.silu(x)


def written_after(view: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def function(x: torch.Tensor) -> torch.Tensor:
        first, second = F.silu(x), F.silu(x)
        view(first).add_(1)
        return first * second

    return function


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.silu(x) + F.silu(x * 2),
        lambda x: F.silu(x) + F.gelu(x),
        lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
        lambda x: F.silu(x.clone(), True) + F.silu(x),
        written_before,
        *map(written_after, VIEWS),
        lambda x: (F.silu(x), F.silu(x)),
        lambda x: (F.silu(x), F.silu(x)[0]),
    ],
)
def test_what_differs_or_is_written_stays(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    probe = GraphProbe(lambda x: function(x.clone()), X)
    assert probe.run(share_activations) == {"share_activations": 0}
