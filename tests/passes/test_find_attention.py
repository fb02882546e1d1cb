from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend import ops
from onlinequant_backend.graph.attention_info import AttentionInfo, all_infos
from onlinequant_backend.kernels import formats
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.passes.find_attention import find_attention
from onlinequant_backend.passes.insert_observers import insert_observers
from onlinequant_backend.passes.rewrite_attention import rewrite_attention
from onlinequant_backend.quantization.observation import Observation, observe_attention
from onlinequant_backend.report.report import CANDIDATE
from tests.helpers.attending import Attending, Twice, X, attention, probe_of
from tests.helpers.graph_probe import EIGHT_BITS, SYMMETRIC, GraphProbe
from tests.helpers.tiny import noise, relative_error


def test_attention_is_named_and_measured() -> None:
    probe = probe_of(Twice())
    first, second = attention(probe)
    assert (first.name, second.name) == ("attn", "attn.2")
    assert (first.input_shape, first.weight_shape) == ((2, 4, 128, 16), (2, 4, 128, 16))
    assert (second.input_shape, second.weight_shape, second.output_shape) == (
        (2, 4, 128, 16),
        (2, 4, 70, 16),
        (2, 4, 128, 16),
    )
    assert second.flops == 4 * 2 * 4 * 128 * 70 * 16
    assert second.bytes == 4 * 2 * 4 * 16 * (128 + 70 + 70 + 128)
    assert second.density == second.flops / second.bytes and second.dtype == torch.float32
    for info in (first, second):
        assert info.is_candidate and info.quantized and info.reason == CANDIDATE and not info.is_short
    kinds = [info.kind for info in all_infos(probe.graph_module)]
    assert kinds == ["linear"] * 3 + ["attention"] + ["linear"] * 4 + ["attention", "linear"]
    probe.assert_settled(find_attention)


MASK = torch.ones(128, 128, dtype=torch.bool)


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"attn_mask": MASK}, "there is no 8-bit kernel for attn_mask"),
        ({"dropout_p": 0.5}, "there is no 8-bit kernel for dropout_p"),
        ({"is_causal": True}, "there is no 8-bit kernel for is_causal"),
        ({"enable_gqa": True}, "there is no 8-bit kernel for enable_gqa"),
    ],
)
def test_what_kernels_do_not_know_stays_in_float(keywords: dict[str, Any], reason: str) -> None:
    (info,) = attention(probe_of(Attending(**keywords), X, X))
    assert not info.is_candidate and not info.quantized and info.reason == reason


def test_arguments_that_change_nothing_are_no_obstacle() -> None:
    (info,) = attention(probe_of(Attending(attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.3), X, X))
    assert info.is_candidate


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((2, 128, 16),) * 3, r"its operands are not \[batch, heads, tokens, size\]"),
        (((2, 4, 80, 16), (2, 4, 80, 16), (2, 4, 80, 32)), "differ in batch, heads or size"),
        (((2, 4, 80, 16), (1, 4, 80, 16), (1, 4, 80, 16)), "differ in batch, heads or size"),
        (((2, 4, 80, 264),) * 3, "its heads are larger than 256"),
        (((2, 4, 0, 16), (2, 4, 80, 16), (2, 4, 80, 16)), "it computes nothing"),
    ],
)
def test_shapes_that_no_kernel_takes(shapes: tuple[tuple[int, ...], ...], reason: str) -> None:
    (info,) = attention(probe_of(F.scaled_dot_product_attention, *(noise(*shape) for shape in shapes)))
    assert not info.is_candidate and re.search(reason, info.reason)


@pytest.mark.parametrize(
    ("precision", "options", "reason"),
    [
        (EIGHT_BITS, {}, "CPUs have no 8-bit kernel for attention"),
        (SYMMETRIC[1], {"quantized_attention_percentage": 0}, "quantized_attention_percentage is 0"),
        (SYMMETRIC[1], {"max_error": 0.1}, "max_error decides about convolutions and linear layers only"),
        (SYMMETRIC[1], {"exclude": ("attn",)}, "excluded by 'attn'"),
        (Precision("float", "the user says so"), {}, "float: the user says so"),
    ],
)
def test_what_options_and_devices_refuse(precision: Precision, options: dict[str, Any], reason: str) -> None:
    found = attention(probe_of(Twice(), precision=precision, **options))
    assert [info.reason for info in found][:1] == [reason] and not any(info.is_candidate for info in found[:1])


def test_short_sequences_are_no_matter_of_precision() -> None:
    options = {"quantized_attention_percentage": 0, "max_error": 0.1}
    (info,) = attention(probe_of(Attending(), noise(3, 25, 64), noise(3, 64, 64), **options))
    assert info.is_short and info.is_candidate
    (info,) = attention(probe_of(Attending(), noise(3, 25, 64), noise(3, 65, 64), **options))
    assert not info.is_short and not info.is_candidate


@pytest.mark.parametrize("precision", SYMMETRIC)
def test_errors_are_those_of_the_8_bit_kernel(precision: Precision) -> None:
    model = Twice()
    probe = probe_of(model, precision=precision)
    expected = probe.call()[0]
    assert probe.run(insert_observers) == {"insert_observers": 10}
    assert probe.added(observe_attention) == 2
    layers, found = probe.new_layers(), attention(probe)
    for compares in (False, True):
        observation = Observation(
            layers,
            probe.weights(),
            compares,
            attention={info.name: info for info in found},
            attention_format=precision.name,
        )
        assert torch.equal(probe.call(observation)[0], expected)
        assert all((info.sensitivity is not None) == compares for info in found)
    q, k, v = (noise(2, 4, 128, 16, seed=seed) for seed in range(3))
    y = F.scaled_dot_product_attention(q, k, v)
    observation.see_attention("attn", q, k, v, None, y)
    error = ops.attention(q, k, v, 0.25, precision.name) - y
    sensitivity = found[0].sensitivity
    assert sensitivity is not None
    assert sensitivity.relative == pytest.approx(float(error.abs().sum() / y.abs().sum()), rel=1e-4)
    assert sensitivity.mse == pytest.approx(float(error.square().mean()), rel=1e-4)
    assert 0 < sensitivity.relative < {"int8": 0.02, "fp8": 0.1}[precision.name]
    probe.assert_settled(insert_observers)


def test_a_kernel_that_does_not_run_leaves_attention_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_operands: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    probe = probe_of(Attending())
    (info,) = attention(probe)
    expected = probe.call()[0]
    probe.run(insert_observers)
    monkeypatch.setattr(ops, "attention", refuse)
    observation = Observation(probe.new_layers(), probe.weights(), True, attention={info.name: info})
    assert torch.equal(probe.call(observation)[0], expected)
    assert not info.is_candidate and not info.quantized
    assert info.reason == "its 8-bit kernel does not run here: RuntimeError: out of resource: shared memory"


def test_a_scale_that_is_computed_stays_in_float() -> None:
    def attend(q: torch.Tensor, scale: float) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, scale=scale * 0.5)

    q = noise(2, 4, 128, 16)
    assert attention(probe_of(attend, q, 0.3))[0].is_candidate  # a constant
    assert attention(probe_of(attend, q, 0.3, dynamic=True))[0].reason == "its scale is computed in the graph"


@pytest.mark.parametrize("scale", [None, 0.5])
def test_selected_attention_becomes_the_op(scale: float | None) -> None:
    model = Twice(scale=scale)
    probe = probe_of(model)
    first, second = attention(probe)
    expected = probe.call()[0]
    assert probe.run(rewrite_attention) == {"rewrite_attention": 0}  # nothing is selected yet
    first.is_replaced, first.quantized = True, False
    second.is_replaced = second.quantized = True
    assert probe.run(rewrite_attention) == {"rewrite_attention": 2}
    factor = 0.25 if scale is None else scale
    assert [node.args[3:] for node in probe.nodes(ops.attention)] == [(factor, formats.FLOAT), (factor, "fp8")]
    assert 1e-4 < relative_error(probe.call()[0], expected) < 0.1
    probe.assert_settled(rewrite_attention)
    second.quantized = False
    probe = probe_of(model)
    for info in attention(probe):
        info.is_replaced, info.quantized = True, False
    probe.run(rewrite_attention)
    assert relative_error(probe.call()[0], expected) < 1e-6


def test_a_layer_of_the_same_name_is_another_one() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(noise(192, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = F.linear(x, self.weight).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Fused()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x)

    probe = probe_of(Model().requires_grad_(False), X)
    assert [info.name for info in all_infos(probe.graph_module)] == ["attn", "attn.2"]


def test_sequences_of_varying_length_are_described_at_their_largest() -> None:
    sizes = (2, 4, 512, 16)
    x = noise(2, 48, 64)

    def found(known: dict[str, Any]) -> AttentionInfo:
        probe = GraphProbe(Attending().requires_grad_(False), x, x, precision=SYMMETRIC[1], dynamic=True)
        probe.context.at_largest = lambda infos: known
        return attention(probe.analyze())[0]

    short = found({})
    assert short.reason == "its sequences are short, and their length varies" and not short.is_possible
    largest = found({short.name: AttentionInfo(short.name, sizes, sizes, sizes, 1000, 10)})
    assert largest.is_candidate and largest.input_shape == sizes and largest.flops == 1000
    sizes = (2, 8, 512, 16)  # of another model
    assert found({short.name: AttentionInfo(short.name, sizes, sizes, sizes)}).input_shape == (2, 4, 48, 16)


def test_the_op_has_the_layout_that_it_promises() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q = noise(2, 4, 8, 16, dtype=dtype)
        for format in ("float", "fp8", "int8"):
            result = ops.attention(q, q, q, 0.25, format)
            assert result.stride() == torch.empty(2, 8, 4, 16).transpose(1, 2).stride() and result.dtype == dtype
