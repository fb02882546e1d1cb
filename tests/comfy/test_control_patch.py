"""The hook of ControlNets, on a stand-in for ComfyUI's class that has the same few methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from onlinequant_backend import SamplingRun
from onlinequant_backend.comfy_integration.control_patch import quantize_control_net
from onlinequant_backend.torch_internals import inductor_interface
from tests.helpers.small import Small, X, texts_into
from tests.helpers.tiny import OPTIONS, relative_error


class Control:
    """A ControlNet object: whoever applies it copies it, and a sampler asks the copy at each step."""

    def __init__(self, control_model: nn.Module | None) -> None:
        self.control_model = control_model
        self.cleaned = 0

    def copy(self) -> Control:
        return Control(self.control_model)

    def get_control(self, x: torch.Tensor, t: Any, cond: Any, number: int, transformer_options: Any) -> torch.Tensor:
        assert self.control_model is not None
        result: torch.Tensor = self.control_model(x)
        return result

    def cleanup(self) -> None:
        self.cleaned += 1

    @torch.no_grad()
    def run(self, interrupted: bool = False) -> list[torch.Tensor]:
        options = {"sample_sigmas": torch.tensor([2.0, 1.0, 0.0])}
        results = [self.get_control(X, None, None, 1, transformer_options=options) for _ in range(2)]
        if not interrupted:
            self.cleanup()
            assert self.cleaned == 1
            self.cleaned = 0
        return results


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_interface, "compile_fx", lambda graph, inputs, options, outside_dynamo: graph)


@pytest.fixture
def network() -> Small:
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


@pytest.fixture
def told() -> list[str]:
    return []


def quantized(control: Control, told: list[str], whole_run: bool = True, **options: Any) -> Control:
    """As a node applies it: a copy."""
    result = quantize_control_net(control, {**OPTIONS, **options}, whole_run, texts_into(told))
    copy = result.copy()
    assert isinstance(copy, Control)
    return copy


def is_8_bit(results: list[torch.Tensor], network: Small) -> list[bool]:
    expected = network(X)
    assert all(relative_error(result, expected) < 0.08 for result in results)
    return [not torch.equal(result, expected) for result in results]


def test_beside_a_model_in_float_it_has_runs_of_its_own(network: Small, told: list[str]) -> None:
    control = quantized(Control(network), told)
    assert is_8_bit(control.run(), network) == [False, False]
    said = list(dict.fromkeys(text.split(" (")[0] for text in told))
    assert said[:3] == ["tracing the model", "observing 1 of 2", "observing 2 of 2"]
    assert told[-1] == "Small: quantized: 3 of 3 layers in int8"
    assert is_8_bit(control.copy().run(), network) == [True, True]
    assert "forward" not in vars(network)


def test_an_interrupted_run_is_observed_again(network: Small, told: list[str]) -> None:
    control = quantized(Control(network), told)
    for _ in range(2):
        assert is_8_bit(control.run(interrupted=True), network) == [False, False]
    assert is_8_bit(control.run(), network) == [False, False]
    assert is_8_bit(control.run(), network) == [True, True]


def test_in_the_run_of_a_model_it_belongs_to_that(network: Small, told: list[str]) -> None:
    control, run = quantized(Control(network), told), SamplingRun(2)
    with run.current():
        assert is_8_bit(control.run(), network) == [False, False]
    assert not any("quantized" in text for text in told)
    run.end()
    assert told[-1] == "Small: quantized: 3 of 3 layers in int8"
    assert len(run.called) == 2


def test_a_number_of_calls_goes_on_in_the_same_run(network: Small, told: list[str]) -> None:
    control = quantized(Control(network), told, whole_run=False, calibration_steps=1)
    assert is_8_bit(control.run(), network) == [False, True]


def test_the_original_stays_as_it_is(network: Small, told: list[str]) -> None:
    control = Control(network)
    quantized(control, told).run()
    assert is_8_bit(control.run(), network) == [False, False]


@pytest.mark.parametrize("control_model", [None, "missing"])
def test_without_a_network_it_stays_in_float_and_says_so(control_model: str | None, told: list[str]) -> None:
    control = Control(None)
    if control_model == "missing":
        del control.control_model
        control.copy = lambda: control  # type: ignore[method-assign]
    quantize_control_net(control, OPTIONS, True, texts_into(told))
    assert told == ["in float: a Control has no network of its own that every step runs"]
