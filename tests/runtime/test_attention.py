"""Attention as a layer: observed, chosen, run in 8 bit, reported, and found again by the next process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import onlinequant_backend as oq
from onlinequant_backend.graph import AttentionInfo
from onlinequant_backend.kernels.cpu_providers import Emulated
from onlinequant_backend.runtime.weight_state import WeightStates
from tests.helpers.attending import CONTEXT, Twice, X
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.small import compiled
from tests.helpers.tiny import relative_error


def decisions() -> dict[str, oq.NodeDecision]:
    return {each.name: each for each in oq.reports()[-1].decisions if each.kind == "attention"}


@torch.no_grad()
def run(calls: int, **options: Any) -> torch.Tensor:
    step = compiled(Twice(), precision="fp8", **options)
    for _ in range(calls):
        result = step(X, CONTEXT)
    return result


@torch.no_grad()
def test_attention_is_observed_selected_and_found_again(inductor: EagerInductor) -> None:
    expected = Twice()(X, CONTEXT)
    in_8_bit = run(4)
    report = oq.reports()[-1]
    assert report.phase == "quantized" and report.headline().endswith("2 of 2 attention layers in 8 bit")
    made = decisions()
    assert [each.reason for each in made.values()] == ["selected"] * 2
    assert all(0 < (each.sensitivity or 0) < 0.1 and each.mse for each in made.values())
    layers_alone = run(4, quantized_attention_percentage=0)
    assert {each.reason for each in decisions().values()} == {"quantized_attention_percentage is 0"}
    assert not torch.equal(in_8_bit, layers_alone)
    assert relative_error(layers_alone, expected) < 0.1 and relative_error(in_8_bit, expected) < 0.1

    oq.reset()
    torch._dynamo.reset()
    assert torch.equal(run(1), in_8_bit)
    report = oq.reports()[-1]
    assert report.cache_hit and report.calls_observed == 0 and decisions() == made


@torch.no_grad()
def test_a_share_of_attention(inductor: EagerInductor) -> None:
    run(4, quantized_attention_percentage=50)
    found = sorted(decisions().values(), key=lambda each: each.sensitivity or 0.0)
    assert [each.quantized for each in found] == [True, False]


@torch.no_grad()
def test_thin_attention_stays_in_float(inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Emulated, "least_density", lambda _self, kind: 1000.0 if kind == "attention" else 0.0)
    run(3)
    assert all(each.reason.endswith("is below 1000") for each in decisions().values())
    assert "0 of 2 attention" in oq.reports()[-1].headline()


@torch.no_grad()
def test_attention_is_in_float_where_no_other_layer_is_in_8_bit(inductor: EagerInductor) -> None:
    for options in ({"quantized_linear_percentage": 0}, {"exclude": ("*",)}, {"linear_compute_density_threshold": 1e6}):
        oq.reset()
        torch._dynamo.reset()
        expected = Twice()(X, CONTEXT)
        assert torch.equal(run(4, **options), expected)
        report = oq.reports()[-1]
        assert report.phase == "float" and not any(each.quantized for each in report.decisions)
        assert report.lacks_requested_precision() == (options != {"exclude": ("*",)})


@torch.no_grad()
def test_errors_are_known_with_other_options_after_a_restart(inductor: EagerInductor) -> None:
    run(4, quantized_attention_percentage=0)
    errors = {name: each.sensitivity for name, each in decisions().items()}
    assert all(errors.values())
    oq.reset()
    torch._dynamo.reset()
    run(1, quantized_attention_percentage=50)
    found = decisions()
    assert {name: each.sensitivity for name, each in found.items()} == errors
    kept = min(errors, key=lambda name: errors[name] or 0.0)
    assert [name for name, each in found.items() if each.quantized] == [kept]


def test_another_choice_is_another_graph() -> None:
    class Set:
        layout = 0

        def smoothing(self) -> dict[int, int]:
            return {}

    info = AttentionInfo("attn")
    states: Any = WeightStates.__new__(WeightStates)
    states._kinds, states.traced = {}, SimpleNamespace(attention={"attn": info})
    kinds = []
    for is_replaced, quantized in ((False, False), (True, False), (True, True), (True, True)):
        info.is_replaced, info.quantized = is_replaced, quantized
        kinds.append(states.kind(Set(), (1, 2)))
    assert kinds == [0, 1, 2, 2]
