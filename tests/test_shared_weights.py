"""Two models that have weights in common, as a model and its copy with a LoRA in a few layers: each draws its own.

What each draws in 8 bit with nobody else running is kept, and every later picture has to be equal to it to the bit.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from onlinequant_backend import copies
from onlinequant_backend.weights import registry
from tests.test_runtime import EagerInductor, compiled, deltas, inductor  # noqa: F401
from tests.test_threads import CLOSE, X, at_once
from tests.tiny import Net, net, relative_error

CALLS = 100


@pytest.fixture(autouse=True)
def _one_thread_each() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def variant(model: Net, factor: float = -1.0) -> Net:
    """A copy of a model that shares all of its weights but three, which make it draw another picture."""
    other = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for layer, delta in deltas(other):
        layer.weight = nn.Parameter((layer.weight + delta) * factor, requires_grad=False)
    assert sum(mine is not its for mine, its in zip(model.parameters(), other.parameters(), strict=True)) == 3
    return other


def in_8_bit(*models: Net) -> list[Callable[[], torch.Tensor]]:
    """A function that calls it for each model, all of them observed together and right."""
    steps = [compiled(model) for model in models]
    for _ in range(4):
        pictures = [step(X) for step in steps]
    for model, picture in zip(models, pictures, strict=True):
        assert 0 < relative_error(picture, model(X)) < CLOSE
    return [functools.partial(step, X) for step in steps]


def differing(call: Callable[[], torch.Tensor], expected: torch.Tensor, count: int = CALLS) -> torch.Tensor:
    """How many of so many calls do not give exactly what is expected."""
    return torch.tensor(sum(not torch.equal(call(), expected) for _ in range(count)))


def test_in_turns_nothing_is_quantized_again(inductor: EagerInductor) -> None:  # noqa: F811
    model = net()
    calls = in_8_bit(model, variant(model), variant(model, 2.0))
    pictures = [call() for call in calls]
    made = copies.Generation.number
    for _ in range(5):
        assert [torch.equal(call(), picture) for call, picture in zip(calls, pictures, strict=True)] == [True] * 3
    assert copies.Generation.number == made
    assert len(inductor.graphs) == 1


def test_at_once_each_draws_its_own_picture(inductor: EagerInductor) -> None:  # noqa: F811
    model = net()
    calls = in_8_bit(model, variant(model), variant(model, 2.0))
    pictures = [call() for call in calls]
    assert relative_error(pictures[0], pictures[1]) > 3 * CLOSE
    wrong = at_once(*(functools.partial(differing, call, picture) for call, picture in zip(calls, pictures, strict=True)))
    assert [int(number) for number in wrong] == [0, 0, 0]


def test_a_second_model_that_comes_while_the_first_is_running(inductor: EagerInductor) -> None:  # noqa: F811
    """Its first calls are observed, and quantize what it does not share while the other runs. They may widen ranges, so
    pictures are near what they were."""
    model = net()
    (first,) = in_8_bit(model)
    others = [variant(model, factor) for factor in (-1.0, 2.0)]
    calls = [first, *(functools.partial(compiled(other), X) for other in others)]

    def far(number: int) -> torch.Tensor:
        expected = (model, *others)[number](X)
        return torch.tensor(sum(relative_error(calls[number](), expected) > CLOSE for _ in range(CALLS)))

    assert [int(number) for number in at_once(*(functools.partial(far, number) for number in range(3)))] == [0, 0, 0]
