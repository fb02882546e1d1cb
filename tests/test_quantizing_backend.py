"""What is said where a graph stays in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend import best_effort, quantizing_backend
from tests.helpers.graph_probe import EIGHT_BITS, GraphProbe
from tests.helpers.small import CLOSE, compiled
from tests.helpers.tiny import noise, relative_error

X = noise(8, 16)

pytestmark = pytest.mark.usefixtures("inductor")  # instead of Inductor itself


class Called(nn.Module):
    """What ``call`` makes of two linear layers and an input."""

    def __init__(self, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.call = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16)), call
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.layers, x)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        (
            {"quantized_conv_percentage": 0, "quantized_linear_percentage": 0},
            "both percentages are 0: raise quantized_conv_percentage or quantized_linear_percentage",
        ),
        (
            {"conv_compute_density_threshold": 500, "linear_compute_density_threshold": 600},
            "all layers are below the thresholds (conv_compute_density_threshold=500; "
            "linear_compute_density_threshold=600): lower these",
        ),
        (
            {"quantized_conv_percentage": 0, "linear_compute_density_threshold": 600},
            "no layer qualifies: 2 conv layers: quantized_conv_percentage is 0, "
            "1 linear layers: density is below linear_compute_density_threshold=600",
        ),
    ],
)
def test_where_nothing_qualifies_the_reason_names_what_to_change(options: dict[str, Any], expected: str | None) -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Linear(12, 16), nn.ReLU())
    probe = GraphProbe(net, torch.empty(2, 8, 16, 16), **options).analyze()
    assert quantizing_backend._why_float(probe.infos, EIGHT_BITS, []) == expected


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_8_bit_that_was_asked_for_by_name_and_not_had_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(best_effort, "_said", set())
    model = Called(lambda layers, x: layers(x))
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            compiled(model, {"precision": precision, "linear_compute_density_threshold": 1e6})(X)
    assert oq.reports()[-1].phase == "float"
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    reason = "all layers are below the thresholds (linear_compute_density_threshold=1e+06): lower these"
    warning = f"Called: precision='int8' was asked for, but no layer of this graph is quantized: {reason}"
    assert said == ([warning] if precision == "int8" else [])


def test_a_function_is_called_by_its_name() -> None:
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)

    def denoise(x: torch.Tensor) -> torch.Tensor:
        x = layers(x)
        torch._dynamo.graph_break()
        return layers(x)

    with torch.no_grad():
        torch.compile(denoise, backend=oq.onlinequant)(X)
    assert [report.model for report in oq.reports()[-2:]] == ["denoise", "denoise"]


def test_a_model_is_called_by_its_class_whatever_its_methods_call_it() -> None:
    class Net(nn.Module):
        def __init__(this) -> None:  # noqa: N805
            super().__init__()
            this.layer = nn.Linear(16, 16)

        def forward(this, x: torch.Tensor) -> torch.Tensor:  # noqa: N805
            return this.layer(x)

    with torch.no_grad():
        compiled(Net().requires_grad_(False))(X)
    assert oq.reports()[-1].model == "Net"


def test_excluding_everything_is_called_that() -> None:
    probe = GraphProbe(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.empty(8, 8), exclude=("*",)).analyze()
    assert quantizing_backend._why_float(probe.infos, EIGHT_BITS, []) == "exclude matches all layers"


def jagged(rows: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 3, len(rows)]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda layers, x: torch.vmap(layers)(x), "torch.func"),
        (lambda layers, x: torch.func.grad(lambda y: layers(y).square().sum())(x), "torch.func"),
        (lambda layers, x: torch.func.jvp(layers, (x,), (x,))[1], "torch.func"),
        (lambda layers, x: layers(jagged(x)).values(), "torch.jagged"),
    ],
    ids=["vmap", "grad", "jvp", "jagged"],
)
def test_tensors_that_no_layer_takes(call: Callable[[nn.Module, torch.Tensor], torch.Tensor], reason: str) -> None:
    model = Called(call)
    step = compiled(model)
    for x in (X, X, noise(11, 16), noise(12, 16)):
        assert relative_error(step(x), model(x)) < 1e-5
    assert all(report.phase == "float" and reason in report.phase_reason for report in oq.reports())
    assert oq.reports()


@torch.no_grad()
def test_nested_inputs() -> None:
    model = Called(lambda layers, x: layers(x))
    step = compiled(model)
    for rows in (X, X, noise(11, 16), noise(12, 16)):
        x = jagged(rows)
        assert relative_error(step(x).values(), model(x).values()) < 1e-5
    assert [report.phase for report in oq.reports()] == ["float"] * len(oq.reports())


@torch.no_grad()
@pytest.mark.parametrize("before", [0, 3])
def test_calls_within_a_transform_are_in_float(before: int) -> None:
    """And those after it are as before."""
    model = Called(lambda layers, x: layers(x))
    step = compiled(model)
    for _ in range(before):
        step(X)
    for _ in range(2):
        assert relative_error(torch.func.functionalize(step)(X), model(X)) < 1e-5
    for _ in range(3):
        result = step(X)
    assert 0 < relative_error(result, model(X)) < CLOSE


@torch.no_grad()
def test_what_cannot_be_analyzed_stays_in_float(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise NotImplementedError("no such thing")

    monkeypatch.setattr(quantizing_backend, "ANALYZE", (fail,))
    model = Called(lambda layers, x: layers(x))
    step = compiled(model)
    for _ in range(2):
        assert relative_error(step(X), model(X)) < 1e-5
    assert oq.reports()[-1].phase_reason == "it failed: NotImplementedError: no such thing"
