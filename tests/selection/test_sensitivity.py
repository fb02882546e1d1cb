"""What a layer's error does to the model's output, estimated by one backward pass."""

from __future__ import annotations

import types
from collections.abc import Callable

import psutil
import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend import operating_system
from tests.helpers.tiny import OPTIONS, Net, net, noise

X = noise(2, 4, 16, 16)

pytestmark = pytest.mark.usefixtures("inductor")  # instead of Inductor itself


def run(model: nn.Module, x: torch.Tensor = X, **options: object) -> oq.Report:
    """Calibrate a model with every layer in 8 bit."""
    oq.reset()
    torch._dynamo.reset()
    step = torch.compile(model, backend=oq.onlinequant, options={**OPTIONS, **options})
    for _ in range(3):
        step(x)
    assert oq.reports()[-1].phase == "quantized"
    return oq.reports()[-1]


def errors(report: oq.Report) -> dict[str, float]:
    """Squared errors by layer."""
    return {decision.name: decision.mse for decision in report.decisions if decision.mse is not None}


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of the ranks."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (a, b)])
    return float(ranks.corrcoef()[0, 1])


class Writing(Net):
    """A network that adds in place, as ComfyUI's do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            h = block(x)
            h += x
            x = h
        return self.conv_out(x)


def writing() -> nn.Module:
    torch.manual_seed(0)
    return Writing(blocks=3).requires_grad_(False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [lambda: net(blocks=4), writing])
def test_the_estimate_is_near_the_measured_error(make: Callable[[], nn.Module], mode: Callable[[], object]) -> None:
    with mode():  # type: ignore[attr-defined]
        model = make()  # its weights are inference tensors there
        x = X.clone()
        estimate, truth = run(model, x, max_error=1.0), run(model, x, sensitivity="end_to_end")
        local = run(model, x, sensitivity="local")
    assert (estimate.sensitivity_kind, truth.sensitivity_kind, local.sensitivity_kind) == (
        "gradient",
        "end_to_end",
        "local",
    )
    true, estimated, own = (list(errors(report).values()) for report in (truth, estimate, local))
    factors = torch.tensor(estimated) / torch.tensor(true)
    assert len(factors) > 10
    assert 0.5 < float(factors.median()) < 1.5
    assert spearman(estimated, true) > 0.9 > spearman(own, true)
    relative = [
        torch.tensor([each.sensitivity for each in report.decisions if each.kind != "attention"])
        for report in (truth, estimate)
    ]
    assert 0.7 < float((relative[1] / relative[0]).median()) < 1.3


@torch.no_grad()
def test_parameters_get_no_gradients() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    assert run(model, quantized_linear_percentage=50).sensitivity_kind == "gradient"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_layers_without_influence_are_harmless() -> None:
    class Gated(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gated = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0 * self.gated(x).mean()

    torch.manual_seed(0)
    report = run(Gated().requires_grad_(False), X, quantized_linear_percentage=50)
    assert report.sensitivity_kind == "gradient"
    by_name = {decision.name: decision for decision in report.decisions}
    assert by_name["gated"].sensitivity == 0 < (by_name["blocks.0.to_v"].sensitivity or 0)
    assert by_name["gated"].quantized


@torch.no_grad()
def test_inference_tensors_that_cannot_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        model, x = net(), X.clone()
        monkeypatch.setattr(operating_system, "_number_in", lambda name: None)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1000, total=10**9))
        assert run(model, x, quantized_linear_percentage=50).sensitivity_kind == "local"


@torch.no_grad()
def test_nothing_is_estimated_where_it_decides_nothing() -> None:
    assert run(net()).sensitivity_kind == "local"
    assert run(net(), quantized_conv_percentage=0).sensitivity_kind == "local"
    assert run(net(), quantized_conv_percentage=50).sensitivity_kind == "gradient"


@torch.no_grad()
def test_another_process_finds_the_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(net(blocks=2), quantized_linear_percentage=50)
    monkeypatch.setattr(
        "onlinequant_backend.selection.layer_choice.estimate_by_gradient", lambda *_: pytest.fail("estimated again")
    )
    second = run(net(blocks=2), quantized_linear_percentage=50)
    assert second.cache_hit and second.sensitivity_kind == "gradient"
    assert errors(second) == errors(first)
    assert [d.quantized for d in second.decisions] == [d.quantized for d in first.decisions]


@torch.no_grad()
def test_layers_that_were_calibrated_for_other_options_are_estimated() -> None:
    run(net(blocks=2))
    report = run(net(blocks=2), quantized_linear_percentage=50)
    assert report.cache_hit and report.sensitivity_kind == "gradient"


@torch.no_grad()
def test_where_the_memory_runs_out_layers_go_by_their_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(range(1000, 0, -100))
    monkeypatch.setattr(operating_system, "_number_in", lambda name: None)  # no limit of a container
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=next(left), total=10**9))
    report = run(net(blocks=3), quantized_linear_percentage=50)
    assert report.sensitivity_kind == "local"
    assert next(left) == 100  # it was stopped at once
    assert errors(report) == errors(run(net(blocks=3), sensitivity="local"))


@torch.no_grad()
def test_a_model_without_gradients_goes_by_its_layers_own_errors() -> None:
    class Rounded(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.round(8 * super().forward(x))

    assert run(Rounded().requires_grad_(False), quantized_linear_percentage=50).sensitivity_kind == "local"
