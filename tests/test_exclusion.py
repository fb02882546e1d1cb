from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend import exclusion
from tests.helpers.reports import layers
from tests.helpers.small import CLOSE
from tests.helpers.tiny import OPTIONS, Net, net, noise, relative_error

X = noise(1, 4, 8, 8)
OF_AN_ADAPTER = [
    "mid.to_q.base_layer",
    "mid.to_q.base_layer.base_layer",
    "mid.to_q.lora_A.default",
    "mid.to_q.lora_B.some style",
    "mid.to_q.lora_magnitude_vector.default",
    "mid.to_q.modules_to_save.default",
    "mid.to_q.original_module",
    "mid.to_q.lora_layer.down",
    "base_model.model.mid.to_q",
    "base_model.model.mid.to_q.base_layer",
]

pytestmark = pytest.mark.usefixtures("inductor")  # instead of Inductor itself


@pytest.mark.parametrize("name", ["mid.to_q", *OF_AN_ADAPTER])
@pytest.mark.parametrize("pattern", ["mid.to_q", "*.to_q", "m?d.to_[qk]", "*to_q*"])
def test_a_pattern_for_a_layer_holds_for_all_parts_of_an_adapter(name: str, pattern: str) -> None:
    assert exclusion.matching(name, ["conv_in", pattern]) == pattern
    assert exclusion.unmatched([pattern, "conv_in"], [name]) == ["conv_in"]


@pytest.mark.parametrize("name", OF_AN_ADAPTER)
def test_a_pattern_may_name_a_part_of_an_adapter_alone(name: str) -> None:
    assert exclusion.matching(name, [name]) == name
    assert exclusion.matching("mid.to_q", [name]) is None


@pytest.mark.parametrize("name", ["mid.to_k", "mid.to_q.0", "to_q", "mid.base_layers.to_q", "explorations.to_q", "mid"])
def test_other_layers_are_not_meant(name: str) -> None:
    assert exclusion.matching(name, ["mid.to_q", "?id.to_q", "mid"]) in (None, name)
    assert exclusion.matching(f"{name}.weight", ["mid.to_q", "mid"]) is None


def kept_in_float(report: oq.Report) -> set[str]:
    return {decision.name for decision in report.decisions if decision.reason.startswith("excluded by")}


def adapted(use_dora: bool = False) -> nn.Module:
    """A net with an adapter for two of its layers that changes the picture."""
    torch.manual_seed(0)
    targets = ["blocks.0.to_q", "blocks.0.to_k"]
    config = peft.LoraConfig(r=4, target_modules=targets, use_dora=use_dora, init_lora_weights=False)
    module: nn.Module = peft.inject_adapter_in_model(config, net())
    return module.requires_grad_(False)


@torch.no_grad()
def test_what_is_excluded_stays_so_with_a_lora() -> None:
    model = adapted()
    step = torch.compile(model, backend=oq.onlinequant, options={**OPTIONS, "exclude": ("*.to_q", "conv_in")})
    for _ in range(4):
        result = step(X)
    assert 0 < relative_error(result, model(X)) < CLOSE
    (report,) = oq.reports()
    assert report.unmatched() == []
    assert kept_in_float(report) == {
        "conv_in",
        "blocks.0.to_q.base_layer",
        "blocks.0.to_q.lora_A.default",
        "blocks.0.to_q.lora_B.default",
    }
    assert {decision.name for decision in report.decisions if decision.quantized} >= {
        "blocks.0.to_k.base_layer",
        "blocks.0.to_v",
    }


@torch.no_grad()
def test_a_pattern_that_excludes_nothing_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A pattern for a layer in another graph of the model is none."""
    model = adapted(use_dora=True)  # its adapters are graphs of their own
    options = {**OPTIONS, "exclude": ("no.such.layer", "*.to_q", "conv_in")}
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(model, backend=oq.onlinequant, options=options)(X)
    (message,) = caplog.messages
    assert message.startswith("exclude: 'no.such.layer' matches no layer")


@torch.no_grad()
def test_a_dora_gives_its_two_layers_to_a_function_each_by_its_name() -> None:
    model = adapted(use_dora=True)
    step = torch.compile(model, backend=oq.onlinequant, options=OPTIONS)
    for _ in range(4):
        result = step(X)
    assert 0 < relative_error(result, model(X)) < CLOSE
    names = {decision.name for report in oq.reports() for decision in report.decisions}
    # Dynamo's graph for to_q serves to_k as well.
    assert {"blocks.0.to_q.lora_A.default", "blocks.0.to_q.lora_B.default", "blocks.0.to_v"} <= names
    assert {report.phase for report in oq.reports() if report.decisions} == {"quantized"}


def two_models(base: Callable[..., Any], refiner: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    refined: torch.Tensor = refiner(base(x))
    return refined


@torch.no_grad()
def test_layers_of_two_models_in_one_graph_can_be_told_apart() -> None:
    models: tuple[Net, Net] = (net(seed=0), net(seed=1))
    options = {**OPTIONS, "exclude": ("base.blocks.*", "*.conv_in")}
    step = torch.compile(two_models, backend=oq.onlinequant, options=options)
    expected = two_models(*models, X)
    assert torch.equal(step(*models, X), expected)
    for _ in range(3):
        assert relative_error(step(*models, X), expected) < CLOSE
    (report,) = oq.reports()
    assert report.phase == "quantized", report.phase_reason
    names = [name.removesuffix(".weight") for name, weight in models[0].named_parameters() if weight.dim() > 1]
    assert sorted(decision.name for decision in layers(report)) == sorted(
        f"{model}.{name}" for model in ("base", "refiner") for name in names
    )
    blocks = {f"base.{name}" for name in names if name.startswith("blocks")}
    assert kept_in_float(report) == {*blocks, "base.conv_in", "refiner.conv_in"}
    # What one of them becomes is no other's.
    models[1].conv_out.weight.mul_(-1)
    assert relative_error(step(*models, X), two_models(*models, X)) < CLOSE
