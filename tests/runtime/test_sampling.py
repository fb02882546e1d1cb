"""Observing for a whole sampling run, whose length only the caller knows."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch

import onlinequant_backend as oq
from onlinequant_backend.progress import told_to
from onlinequant_backend.runtime import SamplingRun, current_run, sampling_run
from onlinequant_backend.torch_internals import inductor_interface
from tests.helpers.small import X, compiled, small, texts_into
from tests.helpers.tiny import OPTIONS


@pytest.fixture(autouse=True)
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What was compiled so far; Inductor is left out, for speed."""
    graphs = list[torch.fx.GraphModule]()

    def compile_fx(graph: torch.fx.GraphModule, *_arguments: object, **_options: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(inductor_interface, "compile_fx", compile_fx)
    return graphs


def test_calls_belong_to_the_innermost_run() -> None:
    assert current_run() is None
    with sampling_run(5) as outer:
        assert current_run() is outer
        with SamplingRun(2).current():
            assert current_run() is not outer
        assert current_run() is outer
    assert current_run() is None


@pytest.mark.parametrize("steps", ["x", None, 20.5])
def test_steps_that_are_no_count_are_a_mistake_that_is_named(steps: Any) -> None:
    with (
        pytest.raises(oq.OnlineQuantError, match="counts the sampler's steps: give an integer") as raised,
        sampling_run(steps),
    ):
        pass
    assert str(raised.value).startswith(f"steps is {steps!r}, ")


def test_steps_may_be_any_integer() -> None:
    assert [SamplingRun(steps).steps for steps in (20, torch.tensor(20), 0, -1)] == [20, 20, 1, 1]


@torch.no_grad()
def test_a_run_is_observed_to_its_end_and_compiled_there(compiles: list[torch.fx.GraphModule]) -> None:
    model = small()
    step, expected, told = compiled(model), model(X), list[str]()
    with told_to(texts_into(told)), sampling_run(3) as run:
        # More calls than the two that the options ask for.
        for run.step in (1, 2, 3, 3):
            assert torch.equal(step(X), expected)
            assert oq.reports()[-1].phase == "calibrating"
        assert told[-1].startswith("observing 3 of 3 (") and not compiles
    assert len(compiles) == 1
    (report,) = oq.reports()
    assert told[-1] == report.summary() == "Small: quantized: 3 of 3 layers in int8"
    assert (report.calls_observed, report.calibration_steps) == (4, 3)
    assert all(decision.sensitivity is not None for decision in report.decisions)
    with told_to(texts_into(told)), sampling_run(3):
        assert not torch.equal(step(X), expected)
    assert len(compiles) == 1 and told[-1] == report.summary()


@torch.no_grad()
def test_a_run_that_is_broken_off_is_observed_again(compiles: list[torch.fx.GraphModule]) -> None:
    model = small()
    step, expected = compiled(model), model(X)
    with contextlib.suppress(KeyboardInterrupt), sampling_run(3):
        step(X)
        raise KeyboardInterrupt
    assert not compiles and oq.reports()[-1].phase == "calibrating"
    with sampling_run(3):
        assert torch.equal(step(X), expected)
    assert len(compiles) == 1 and not torch.equal(step(X), expected)


@torch.no_grad()
def test_a_run_that_is_not_observed_leaves_it_to_the_options(compiles: list[torch.fx.GraphModule]) -> None:
    step = compiled(small())
    run = SamplingRun(9, is_observed=False)
    with run.current():
        for _ in range(3):
            step(X)
    assert len(compiles) == 1
    (report,) = oq.reports()
    assert run.called == [(report, "calibrating")] * 3 and report.phase == "quantized"


def test_what_comes_at_the_end_comes_once() -> None:
    done = list[str]()
    run = SamplingRun(1)
    for key, name in (("a", "replaced"), ("b", "b"), ("a", "a")):
        run.at_end(key, functools.partial(done.append, name))
    run.end()
    run.end()
    assert done == ["a", "b"]


@torch.no_grad()
def test_each_is_told_of_its_own_model() -> None:
    # Dynamo makes one graph of both.
    first, second, run = list[str](), list[str](), SamplingRun(1)
    for told in (first, second):
        with told_to(texts_into(told)), run.current():
            compiled(small())(X)
    run.end()
    for told in (first, second):
        assert sum(text.startswith("Small: quantized") for text in told) == 1


@torch.no_grad()
def test_a_failure_at_the_end_leaves_the_model_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(inductor_interface, "compile_fx", fail)
    model = small()
    step, expected = compiled(model), model(X)
    with sampling_run(1):
        step(X)
    assert oq.reports()[-1].phase == "float" and "no compiler" in oq.reports()[-1].phase_reason
    assert torch.equal(step(X), expected)


@torch.no_grad()
def test_end_to_end_sensitivity_is_measured_at_the_end() -> None:
    model = small()
    step = torch.compile(model, backend=oq.onlinequant, options=dict(OPTIONS, sensitivity="end_to_end"))
    with sampling_run(1):
        step(X)
    assert all(decision.sensitivity for decision in oq.reports()[-1].decisions)
