"""Sequential offload, which puts other tensors in the place of the weights at each call."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from tests.helpers.small import X, compiled, small


class Hook:
    """Has a layer's weights in place during its calls only, as accelerate's ``AlignDevicesHook`` does."""

    def __init__(self, module: nn.Module) -> None:
        self._weights = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}

    @torch.compiler.disable
    def before(self, module: nn.Module) -> None:
        for name, weight in self._weights.items():
            module._parameters[name] = nn.Parameter(weight.clone(), requires_grad=False)

    @torch.compiler.disable
    def after(self, module: nn.Module) -> None:
        for name, weight in self._weights.items():
            module._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)


def offload(model: nn.Module) -> None:
    for module in model.children():
        hook, forward = Hook(module), module.forward

        def hooked(module: nn.Module, hook: Hook, forward: Any, *args: Any) -> Any:
            hook.before(module)
            result = forward(*args)
            hook.after(module)
            return result

        hook.after(module)
        module.forward = functools.partial(hooked, module, hook, forward)


@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_weights_that_are_replaced_at_each_call_are_not_observed_for_good() -> None:
    model = small()
    expected = model(X)
    offload(model)
    step = compiled(model)
    for _ in range(12):
        assert torch.equal(step(X), expected)
    assert {report.phase for report in oq.reports()} == {"float"}
    assert any("enable_model_cpu_offload" in report.phase_reason for report in oq.reports())


@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_models_that_come_and_go_are_no_offload() -> None:
    @functools.partial(torch.compile, backend=oq.onlinequant, options={"precision": "int8", "calibration_steps": 9})
    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = model(x)
        return result

    for seed in range(6):
        model = small(seed)
        for _ in range(2):
            assert torch.equal(step(model, X), model(X))
    assert all("offload" not in report.phase_reason for report in oq.reports())
