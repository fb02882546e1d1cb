"""The report says what the last call ran, also where another model, another size, or another try ran otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import onlinequant_backend as oq
from onlinequant_backend.compilation.compiled_graph import CompiledGraph
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.small import CLOSE, WIDE, X, compiled, small
from tests.helpers.tiny import noise, relative_error

Step = Callable[..., torch.Tensor]

pytestmark = pytest.mark.usefixtures("inductor")  # instead of Inductor itself


def phase(model: torch.nn.Module, step: Step, x: torch.Tensor = X) -> str:
    """What the report calls a call, which is what it was."""
    picture, expected = step(x), model(x)
    report = oq.reports()[-1]
    assert torch.equal(picture, expected) == (report.phase != "quantized")
    assert not picture.numel() or relative_error(picture, expected) < CLOSE
    return report.phase


@torch.no_grad()
def test_two_models_with_one_graph() -> None:
    first, second = small(1), small(2)
    step, other = compiled(first), compiled(second)
    assert [phase(first, step) for _ in range(3)] == ["calibrating", "calibrating", "quantized"]
    for calls in (1, 2):
        assert phase(second, other) == "calibrating"
        assert oq.reports()[-1].calls_observed == calls
        assert oq.reports()[-1].summary() == f"Small: observed {calls} of 2 steps"
        assert phase(first, step) == "quantized"
    assert phase(second, other) == "quantized"
    assert len(oq.reports()) == 1


@torch.no_grad()
def test_a_size_that_fails_and_works_when_it_is_tried_again(inductor: EagerInductor) -> None:
    model, sizes = small(), (WIDE, noise(2, 4, 16, 8))
    step = compiled(model)
    for _ in range(3):
        step(X)
    inductor.error = RuntimeError("no compiler")
    assert phase(model, step, WIDE) == "float"
    inductor.error = None
    step(sizes[1])  # of another size: may be done again in float
    assert [phase(model, step, x) for x in (*sizes, *sizes)] == ["float", "quantized"] * 2
    step(WIDE)
    assert oq.reports()[-1].phase_reason == "it failed: RuntimeError: no compiler"
    with oq.sampling_run(1):
        assert phase(model, step, WIDE) == "quantized"


@torch.no_grad()
def test_a_call_that_fails_and_works_when_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled again then."""

    def fail(*_: object) -> None:
        raise MemoryError("no memory left")

    model = small()
    step = compiled(model)
    assert [phase(model, step) for _ in range(3)][-1] == "quantized"
    with monkeypatch.context() as patch:
        patch.setattr(CompiledGraph, "prepare", fail)
        assert phase(model, step) == "float"
    assert phase(model, step) == "float"  # in the same run, as far as anybody knows
    assert oq.reports()[-1].phase_reason == "it failed: MemoryError: no memory left"
    with oq.sampling_run(1):
        assert phase(model, step) == "quantized"


@torch.no_grad()
def test_a_call_without_values() -> None:
    model = small()
    step = compiled(model)
    assert [phase(model, step, x) for x in (X, X, X, WIDE, WIDE)][-1] == "quantized"
    assert [phase(model, step, x) for x in (noise(0, 4, 8, 8), WIDE)] == ["float", "quantized"]
