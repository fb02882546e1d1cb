from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend.passes import REWRITE
from onlinequant_backend.passes.keep_views import keep_views
from tests.helpers.graph_probe import GraphProbe, host_precision
from tests.helpers.tiny import noise, relative_error

CONTIGUOUS = torch.ops.aten.contiguous.default
X = noise(2, 4, 8, 8)
Function = Callable[[torch.Tensor], torch.Tensor]


class Both(nn.Module):
    """What ``function`` makes of a convolution's result, which in 8 bit is channels last."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.function = function
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.conv(x))


def rewritten(function: Function) -> tuple[GraphProbe, dict[str, int], torch.Tensor]:
    """The graph, what each pass has changed of it, and its 8-bit results."""
    probe = GraphProbe(Both(function), X, precision=host_precision()).analyze()
    layers = probe.observe()
    changes = probe.run(*REWRITE)
    return probe, changes, probe.call_quantized(layers)


def through(view: Function) -> Function:
    def function(h: torch.Tensor) -> torch.Tensor:
        view(h).mul_(3)
        return h * 2

    return function


def of_what_is_made_of_it(h: torch.Tensor) -> torch.Tensor:
    h = F.silu(h)
    h.reshape(2, 8, -1).add_(1)
    return h * 2


@pytest.mark.parametrize(
    "function",
    [
        through(lambda h: h.flatten(2)),
        through(lambda h: h.view(2, 2, 4, 64)[:, 1]),
        through(lambda h: h.reshape(-1)[::3]),
        through(lambda h: h.contiguous()[0]),
        of_what_is_made_of_it,
    ],
)
def test_what_is_written_through_a_view_reaches_it(function: Function) -> None:
    probe, changes, (result,) = rewritten(function)
    assert changes["keep_views"] == 1
    assert 0 < relative_error(result, Both(function)(X)) < 0.05
    probe.assert_settled(keep_views)


@pytest.mark.parametrize("view", [lambda h: h.flatten(2), lambda h: h.expand(h.shape)])
def test_two_results_in_one_memory_stay_so(view: Function) -> None:
    _, changes, results = rewritten(lambda h: (h, view(h)))
    assert changes["keep_views"] == 1
    assert len({result.untyped_storage().data_ptr() for result in results}) == 1


@pytest.mark.parametrize("function", [lambda h: h.view(2, -1) * 2, lambda h: F.silu(h).view(2, 8, 64)])
def test_a_view_that_there_is_not_becomes_a_copy(function: Function) -> None:
    probe, changes, (result,) = rewritten(function)
    assert changes["keep_views"] == 1
    assert 0 < relative_error(result, Both(function)(X)) < 0.05
    probe.assert_settled(keep_views)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.relu(h, inplace=True) * 2,
        lambda h: F.silu(h.flatten(2)),
        lambda h: h[:, :4] * h[:, 4:],
        lambda h: h.contiguous().view(torch.int32) * 2,
    ],
)
def test_what_matters_to_nobody_costs_nothing(function: Function) -> None:
    probe = GraphProbe(Both(function), X).analyze()
    assert probe.run(keep_views) == {"keep_views": 0}
    assert probe.after == probe.before
