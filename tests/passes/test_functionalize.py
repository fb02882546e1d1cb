from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from onlinequant_backend.graph import fx_utils
from onlinequant_backend.passes.functionalize import functionalize
from tests.helpers.graph_probe import GraphProbe
from tests.helpers.tiny import noise

Function = Callable[[torch.Tensor], torch.Tensor]


def written(op: Callable[..., torch.Tensor], value: object) -> Function:
    """``value`` is written into a tensor that is read before and after that, under both of its names."""

    def function(x: torch.Tensor) -> torch.Tensor:
        h = x + 1
        before = h.sum()
        held = [h]
        h = op(h, value)
        return h * before + held[0]

    return function


def of_a_view(x: torch.Tensor) -> torch.Tensor:
    v = (x + 1).view(-1)
    v += 1
    return v * 2


def twice(x: torch.Tensor) -> torch.Tensor:
    h = F.silu(x)
    h += x
    h *= h
    return h


@pytest.mark.parametrize(
    ("function", "changes"),
    [
        *((written(op, 3.0), 1) for op in (operator.iadd, operator.isub, operator.imul, operator.itruediv)),
        (written(operator.iadd, 2), 1),
        (lambda x: operator.iadd(x * 2, x), 1),
        (lambda x: operator.iadd(x * 2, x[0]), 1),
        (of_a_view, 1),
        (twice, 2),
    ],
)
def test_what_the_graph_has_made_is_left_as_it_was(function: Function, changes: int) -> None:
    x = noise(2, 8)
    expected = function(x)
    probe = GraphProbe(function, x)
    assert any(map(fx_utils.writes_in_place, probe.graph_module.graph.nodes))
    assert probe.run(functionalize) == {"functionalize": changes}
    assert not any(map(fx_utils.writes_in_place, probe.graph_module.graph.nodes))
    for _ in range(2):
        (result,) = probe.call()
        assert torch.equal(result, expected)
    probe.assert_settled(functionalize)


def read_through_a_view(x: torch.Tensor) -> torch.Tensor:
    h = x + 1
    row = h[0]
    h += 1
    return h + row


def read_through_its_base(x: torch.Tensor) -> torch.Tensor:
    h = x + 1
    row = h[0]
    row += 1
    return h * 2


def into_an_input(x: torch.Tensor) -> torch.Tensor:
    rows = x.view(-1)
    rows += 1
    return rows * 2


@pytest.mark.parametrize(
    "function",
    [
        read_through_a_view,
        read_through_its_base,
        into_an_input,
        lambda x: operator.iadd((x > 0).to(torch.float16), x).float(),
        lambda x: operator.iand(x > 0, x > 1).float(),
    ],
)
def test_what_somebody_would_notice_stays(function: Function) -> None:
    x = noise(2, 8)
    probe = GraphProbe(function, x)
    assert probe.run(functionalize) == {"functionalize": 0}
    expected = function(x.clone())
    (result,) = probe.call()
    assert torch.equal(result, expected)
