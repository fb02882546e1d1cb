"""Several Python threads in one model, and in several: what each gets is right, and nothing is done twice.

Inductor is replaced by running the rewritten graph as it is, which is quick and counts.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import onlinequant_backend as oq
from onlinequant_backend.compilation.compiled_graph import CompiledGraph
from onlinequant_backend.quantization import weight_set
from onlinequant_backend.quantization.weight_set import WeightSet
from onlinequant_backend.runtime.drift_watch import DriftWatch
from tests.helpers.eager_inductor import EagerInductor, dynamo_graphs
from tests.helpers.small import CLOSE, X, compiled
from tests.helpers.threads import at_once
from tests.helpers.tiny import Net, deltas, net, noise, relative_error

THREADS = 4
STEPS = 6
SIZES = ((1, 8, 8), (2, 12, 8), (1, 8, 16), (3, 4, 4))


@pytest.fixture(autouse=True)
def _count_from_zero() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # else each Python thread starts threads of its own
    yield
    torch.set_num_threads(threads)


class Caller:
    """Calls a compiled model with one input, and knows how many of the pictures were observed ones."""

    def __init__(self, model: Net, step: Callable[..., torch.Tensor], x: torch.Tensor = X) -> None:
        self._model, self._step, self._x = model, step, x
        self.observed = 0

    def __call__(self) -> torch.Tensor:
        return self._step(self._x)

    @torch.no_grad()
    def check(self, picture: torch.Tensor) -> None:
        """While observing a picture is the float model's to the bit; after that it is near."""
        expected = self._model(self._x)
        assert relative_error(picture, expected) < CLOSE
        self.observed += torch.equal(picture, expected)


def rounds(callers: Sequence[Caller], count: int) -> int:
    """So many calls of each caller, all callers at once; how many of all these calls were observed."""
    for _ in range(count):
        for caller, picture in zip(callers, at_once(*callers), strict=True):
            caller.check(picture)
    return sum(caller.observed for caller in callers)


def calls_observed() -> int:
    return max(report.calls_observed for report in oq.reports())


def test_one_model_from_its_first_call_on(inductor: EagerInductor) -> None:
    """Dynamo traces in each thread that finds no graph; what we make of that is still one calibration and one build."""
    model = net()
    callers = [Caller(model, step) for step in [compiled(model, calibration_steps=STEPS)] * THREADS]
    assert rounds(callers, 4) == STEPS == calls_observed()
    assert len(inductor.graphs) == 1
    assert oq.reports()[-1].phase == "quantized"


def test_one_model_that_is_calibrated_after_one_call(inductor: EagerInductor) -> None:
    """Then some threads compile while others still observe."""
    model = net()
    step = compiled(model, calibration_steps=1)
    assert rounds([Caller(model, step) for _ in range(THREADS)], 3) == 1 == calls_observed()


@torch.no_grad()
def test_one_model_that_has_been_traced(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model, calibration_steps=STEPS)
    step(X)
    callers = [Caller(model, step) for _ in range(THREADS)]
    assert rounds(callers, 4) == STEPS - 1
    assert (calls_observed(), len(oq.reports()), len(inductor.graphs), dynamo_graphs()) == (STEPS, 1, 1, 1)
    assert oq.reports()[-1].phase == "quantized"


def test_two_models_at_once(inductor: EagerInductor) -> None:
    models = [net(seed=1), net(seed=2, blocks=2)]
    callers = [Caller(model, compiled(model, calibration_steps=2)) for model in models]
    rounds(callers, 5)
    assert [caller.observed for caller in callers] == [2, 2]
    assert [report.calls_observed for report in oq.reports()] == [2, 2]
    assert [report.phase for report in oq.reports()] == ["quantized", "quantized"]
    assert len(inductor.graphs) == 2


def test_two_models_of_one_architecture_share_a_graph_and_no_weights(inductor: EagerInductor) -> None:
    models = [net(seed=1), net(seed=2)]
    callers = [Caller(model, compiled(model, calibration_steps=2)) for model in models]
    rounds(callers, 6)
    assert [caller.observed for caller in callers] == [2, 2]
    assert len(inductor.graphs) == 1


def test_a_model_whose_copies_are_released_meanwhile(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model, calibration_steps=1)
    callers = [Caller(model, step) for _ in range(2)]
    rounds(callers, 2)
    observed = calls_observed()
    is_over = threading.Event()

    def release() -> torch.Tensor:
        while not is_over.is_set():
            oq.release(model)
        return X

    def call(caller: Caller) -> torch.Tensor:
        try:
            for _ in range(20):
                picture = caller()
                caller.check(picture)  # which may be in float, where copies are released faster than they are made
            return picture
        finally:
            is_over.set()

    at_once(release, *(functools.partial(call, caller) for caller in callers))
    with torch.no_grad():
        assert not torch.equal(step(X), model(X))  # as it would be, had anything failed
    assert (calls_observed(), len(inductor.graphs), oq.reports()[-1].phase) == (observed, 1, "quantized")


@torch.no_grad()
@pytest.mark.parametrize("where", [(WeightSet, "begin_check"), (DriftWatch, "run"), (CompiledGraph, "_taken")])
def test_copies_that_are_released_in_the_middle_of_a_call(
    where: tuple[type, str], inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the call has found them current, before it is handed them, and before it computes with them."""
    model = net()
    step = compiled(model, calibration_steps=1)
    pictures = [step(X) for _ in range(2)]
    original = getattr(*where)

    def release_first(*args: Any, **kwargs: Any) -> Any:
        assert oq.release(model) > 0
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(*where, release_first)
        assert torch.equal(step(X), pictures[-1])
    # What that call has left behind is nothing that a later one goes on with.
    original_weight = model.conv_out.weight
    model.conv_out.weight = torch.nn.Parameter(original_weight * 2, requires_grad=False)
    assert 0 < relative_error(step(X), model(X)) < CLOSE
    assert (len(inductor.graphs), oq.reports()[-1].phase) == (1, "quantized")


@torch.no_grad()
def test_each_thread_with_another_size(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model, calibration_steps=STEPS)
    callers = [Caller(model, step, noise(batch, 4, *size)) for batch, *size in SIZES]
    for caller in callers[:2]:  # so that Dynamo has both graphs, the one for the first size and that for all others
        caller.check(caller())
    assert rounds(callers, 5) == STEPS == calls_observed()
    # Of the first size, and of all others, which one of those may have been compiled for before.
    assert len(inductor.graphs) <= 3
    # Dynamo moves the graph that fits to the front, where other threads, searching, may miss it and trace again.
    assert dynamo_graphs() <= 2 + THREADS


@torch.no_grad()
@pytest.mark.parametrize("sizes", [SIZES[:1] * THREADS, SIZES], ids=["one size", "many sizes"])
def test_weights_that_change_between_rounds(inductor: EagerInductor, sizes: Sequence[tuple[int, ...]]) -> None:
    model = net()
    step = compiled(model)
    callers = [Caller(model, step, noise(batch, 4, *size)) for batch, *size in sizes]
    rounds(callers[:1], 3)
    rounds(callers, 2)
    built = len(inductor.graphs)
    for _ in range(4):
        before = model(X)
        for layer, delta in deltas(model):
            layer.weight.data += delta
        assert relative_error(model(X), before) > 3 * CLOSE
        rounds(callers, 2)
    assert len(inductor.graphs) == built
    assert calls_observed() == 2


@torch.no_grad()
def test_a_call_that_comes_while_another_selects(inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees a set of weights that is half ready."""
    model = net()
    caller = Caller(model, compiled(model))
    rounds([caller], 2)
    selecting, called = threading.Event(), threading.Event()
    quantize = weight_set.WeightSet._bring_up_to_date

    def quantize_late(*arguments: Any) -> int:
        selecting.set()
        called.wait(0.5)  # in vain, since the other call has to wait for this one
        return quantize(*arguments)

    monkeypatch.setattr(weight_set.WeightSet, "_bring_up_to_date", quantize_late)

    def second() -> torch.Tensor:
        assert selecting.wait(60)
        picture = caller()
        called.set()
        return picture

    for picture in at_once(caller, second):
        caller.check(picture)
    assert caller.observed == 2
    assert oq.reports()[-1].phase == "quantized"


@torch.no_grad()
def test_the_last_call_is_observed_once(inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs, each with its own place in Dynamo, have one calibration."""
    model = net()
    step = compiled(model, calibration_steps=3, shapes="static")
    callers = [Caller(model, step), Caller(model, step, noise(2, 4, 12, 8))]
    for caller in callers:
        caller.check(caller())
    both = threading.Barrier(2)
    count_call = weight_set.WeightSet.count_call

    def count_call_together(*arguments: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # in vain, since the other call has to wait for this one
        count_call(*arguments)

    monkeypatch.setattr(weight_set.WeightSet, "count_call", count_call_together)
    assert rounds(callers, 1) == 3 == calls_observed()
