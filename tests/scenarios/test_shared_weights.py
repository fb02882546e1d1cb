"""Weights in common: of a model and its copy with a LoRA in a few layers, and of two places in one model.

What each model draws in 8 bit with nobody else running is kept, and every later picture has to be equal to it to the
bit.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.quantization import weight_copy
from onlinequant_backend.runtime.set_registry import known_sets
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.small import CLOSE, X, compiled, forget_everything
from tests.helpers.threads import at_once
from tests.helpers.tiny import Net, deltas, net, noise, relative_error

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


def test_in_turns_nothing_is_quantized_again(inductor: EagerInductor) -> None:
    model = net()
    calls = in_8_bit(model, variant(model), variant(model, 2.0))
    pictures = [call() for call in calls]
    made = weight_copy.Generation.number
    for _ in range(5):
        assert [torch.equal(call(), picture) for call, picture in zip(calls, pictures, strict=True)] == [True] * 3
    assert weight_copy.Generation.number == made
    assert len(inductor.graphs) == 1


def test_at_once_each_draws_its_own_picture(inductor: EagerInductor) -> None:
    model = net()
    calls = in_8_bit(model, variant(model), variant(model, 2.0))
    pictures = [call() for call in calls]
    assert relative_error(pictures[0], pictures[1]) > 3 * CLOSE
    wrong = at_once(*map(functools.partial, [differing] * 3, calls, pictures))
    assert [int(number) for number in wrong] == [0, 0, 0]


def test_a_second_model_that_comes_while_the_first_is_running(inductor: EagerInductor) -> None:
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


def test_in_turns_with_replaced_and_changed_weights(inductor: EagerInductor) -> None:
    """Each model keeps up with its own weights, whatever the other has done."""
    models = [net()]
    models.append(variant(models[0]))
    calls = in_8_bit(*models)
    pictures = [call() for call in calls]
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for module in layers[::3]:
        weight = module.weight
        module.weight = nn.Parameter(weight.flip(0), requires_grad=False)
        for each, call in zip(models, calls, strict=True):
            assert 0 < relative_error(call(), each(X)) < CLOSE
        module.weight = weight
    assert [torch.equal(call(), picture) for call, picture in zip(calls, pictures, strict=True)] == [True, True]
    assert len(inductor.graphs) == 1


def test_originals_that_are_put_aside_need_no_copies_of_their_own(inductor: EagerInductor) -> None:
    """As ComfyUI does for a sampling run with a LoRA. Nor is anything observed again."""
    model = net()
    (call,) = in_8_bit(model)
    picture, made = call(), all_copies()
    for factor in (1.0, 2.0, -1.0):
        originals = [(layer, layer.weight) for layer, _ in deltas(model)]
        for layer, delta in deltas(model):
            layer.weight = nn.Parameter((layer.weight + delta) * factor, requires_grad=False)
        assert relative_error(call(), model(X)) < CLOSE
        assert 0 < relative_error(call(), model(X)) < CLOSE
        assert all_copies() == made
        for layer, weight in originals:
            layer.weight = weight
        assert relative_error(call(), picture) < CLOSE
        assert all_copies() == made
    assert (oq.reports()[-1].calls_observed, len(inductor.graphs)) == (2, 1)


def all_copies() -> set[weight_copy.Copy]:
    return {layer.copy for known in known_sets for layer in known.layers}


@pytest.mark.parametrize("change", ["replaced", "in place"])
def test_at_once_with_weights_that_their_owner_changes(inductor: EagerInductor, change: str) -> None:
    """The thread of each model goes to and fro between two LoRAs of its own, as ComfyUI and as diffusers do."""
    models = [net()]
    models.append(variant(models[0]))
    calls = in_8_bit(*models)

    def lora(number: int, is_on: bool) -> None:
        for layer, weight, patched in layers[number]:
            if change == "replaced":
                layer.weight = nn.Parameter(patched.clone(), requires_grad=False) if is_on else weight
            else:
                layer.weight.copy_(patched if is_on else weight)

    layers = [
        [
            (each, each.weight if change == "replaced" else each.weight.clone(), each.weight + delta)
            for each, delta in found
        ]
        for found in map(deltas, models)
    ]
    pictures = []
    for number, call in enumerate(calls):
        lora(number, True)
        call(), call()  # which may widen a range
        patched = call()
        lora(number, False)
        call()
        pictures.append((call(), patched))
        assert relative_error(*pictures[-1]) > 3 * CLOSE
    wanted = []
    for number, call in enumerate(calls):
        lora(number, True)
        patched = call()
        lora(number, False)
        wanted.append((call(), patched))

    def work(number: int) -> torch.Tensor:
        wrong = 0
        for turn in range(CALLS):
            is_on = turn % 3 == 0
            if turn % 3 < 2:
                lora(number, is_on)
            # Not to the bit: a layer that the other thread had to part from may have a range of its own. The other
            # pictures are far away.
            wrong += not relative_error(calls[number](), wanted[number][is_on]) < CLOSE
        return torch.tensor(wrong)

    assert [int(number) for number in at_once(functools.partial(work, 0), functools.partial(work, 1))] == [0, 0]


def test_one_model_that_changes_while_another_thread_calls_it(inductor: EagerInductor) -> None:
    """A call that is running goes on with the copies that it began with: it is of the weights before or after."""
    model = net()
    (call,) = in_8_bit(model)
    layer = model.blocks[0].conv
    weights = (layer.weight.data, layer.weight.flip(0).contiguous())
    pictures = []
    for weight in (*weights, *weights):
        layer.weight.data = weight
        call()
        pictures.append(call())
    wanted = pictures[2:]
    assert relative_error(*wanted) > 3 * CLOSE
    is_over = threading.Event()

    def owner() -> torch.Tensor:
        wrong = 0
        for turn in range(CALLS):
            layer.weight.data = weights[turn % 2]  # at one blow, so that no thread reads half of it
            wrong += not torch.equal(call(), wanted[turn % 2])
        is_over.set()
        return torch.tensor(wrong)

    def other() -> torch.Tensor:
        wrong = 0
        while not is_over.is_set():
            picture = call()
            wrong += not any(torch.equal(picture, each) for each in wanted)
        return torch.tensor(wrong)

    assert [int(number) for number in at_once(owner, other)] == [0, 0]


# --- two places in one model ---


class Tied(nn.Module):
    """One linear layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), self.linear(y)


def outlying(x: torch.Tensor) -> torch.Tensor:
    """The same with a channel that has to be smoothed."""
    return torch.cat([x[:, :1] * 1000, x[:, 1:]], 1)


@pytest.mark.parametrize(("change", "number"), [(lambda y: y * 1e-3, 1), (outlying, 2)], ids=["small", "smoothed"])
def test_a_weight_that_is_used_twice_has_two_ranges(
    change: Callable[[torch.Tensor], torch.Tensor],
    number: int,
    inductor: EagerInductor,
) -> None:
    """And one copy, unless one of the inputs is smoothed in another way."""
    torch.manual_seed(0)
    model = Tied().requires_grad_(False)
    x, y = noise(128, 64), change(noise(128, 64, seed=2))
    for found in (False, True):
        step = compiled(model)
        for _ in range(3):
            results = step(x, y)
        assert all(0 < relative_error(*pair) < 0.02 for pair in zip(results, model(x, y), strict=True))
        assert oq.reports()[-1].cache_hit == found
        assert all(decision.quantized and decision.sensitivity < 0.02 for decision in oq.reports()[-1].decisions)
        assert oq.copied_bytes(model) == number * model.linear.weight.numel()
        model.linear.weight.mul_(-1)
        assert all(0 < relative_error(*pair) < 0.02 for pair in zip(step(x, y), model(x, y), strict=True))
        model.linear.weight.mul_(-1)
        forget_everything()


class Pair(nn.Module):
    """Two linear layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x), self.second(y)


@pytest.mark.parametrize("calls", [1, 3])
def test_layers_that_get_one_weight_later_keep_their_ranges(calls: int, inductor: EagerInductor) -> None:
    torch.manual_seed(0)
    model = Pair().requires_grad_(False)
    x, y = noise(128, 64), noise(128, 64, seed=2) * 100
    step = compiled(model)
    for _ in range(calls):
        step(x, y)
    model.second.weight = model.first.weight
    for _ in range(3):
        results = step(x, y)
    assert all(0 < relative_error(*pair) < 0.02 for pair in zip(results, model(x, y), strict=True))
    model.first.weight = nn.Parameter(-model.first.weight, requires_grad=False)
    assert all(0 < relative_error(*pair) < 0.02 for pair in zip(step(x, y), model(x, y), strict=True))
    assert len(oq.reports()) == 1


@torch.no_grad()
def test_a_shared_weight_that_another_model_has_followed_first(inductor: EagerInductor) -> None:
    """Its copy is up to date then, and yet the activations are others."""
    first, second = net(seed=1), net(seed=2)
    second.conv_in = first.conv_in
    steps = [compiled(model) for model in (first, second)]
    for step in steps:
        for _ in range(4):
            step(X)
    first.conv_in.weight.mul_(8)
    for _ in range(3):
        steps[1](X)
    for _ in range(2):
        assert relative_error(steps[0](X), first(X)) < CLOSE
