"""Models whose weights are float8 and are cast where they are used: in 8 bit without ever being in float as a whole."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.errors import FreedWeightsError
from onlinequant_backend.quantization import host_weights, weight_copy
from tests.helpers.eager_inductor import EagerInductor, dynamo_graphs
from tests.helpers.hosted import hosted as hosted
from tests.helpers.hosted import on_host
from tests.helpers.reports import layers
from tests.helpers.small import CLOSE, FOUND, compiled
from tests.helpers.tiny import noise, relative_error
from tests.helpers.tiny_unet import ADAPTED, tiny_unet

INPUTS = (noise(1, 4, 16, 16), torch.tensor(500.0), noise(1, 7, 32))
FP8 = torch.float8_e4m3fn
LAYERS = (nn.Linear, nn.Conv2d)


class CastLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


class CastConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight.to(dtype=x.dtype), self.bias.to(x.dtype))


def with_casting_layers(unet: UNet2DConditionModel, storage: torch.dtype = FP8) -> None:
    """What ComfyUI's layers do."""
    for layer in unet.modules():
        if isinstance(layer, LAYERS):
            layer.__class__ = CastLinear if isinstance(layer, nn.Linear) else CastConv
            layer.to(storage)


def with_hooks(unet: UNet2DConditionModel, storage: torch.dtype = FP8) -> None:
    unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)


Cast = Callable[..., None]
casts = pytest.mark.parametrize("cast", [with_casting_layers, with_hooks])


def in_float8(cast: Cast, storage: torch.dtype = FP8, seed: int = 0) -> UNet2DConditionModel:
    unet = tiny_unet(seed)
    cast(unet, storage)
    return unet


def result_of(step: Callable[..., Any]) -> torch.Tensor:
    result: torch.Tensor = step(*INPUTS).sample
    return result


def run(unet: UNet2DConditionModel, **options: Any) -> tuple[Callable[..., Any], torch.Tensor]:
    """Observe and compile; returns the step and its first 8-bit result."""
    step = compiled(unet, options)
    for _ in range(2):
        result_of(step)
    return step, result_of(step)


@pytest.fixture
def quantized_dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the weights that 8-bit copies are made of."""
    dtypes = list[torch.dtype]()
    quantize = weight_copy.quantize_weight

    def spied(weight: torch.Tensor, *args: Any) -> Any:
        dtypes.append(weight.dtype)
        return quantize(weight, *args)

    monkeypatch.setattr(weight_copy, "quantize_weight", spied)
    return dtypes


def floats_alive(unet: UNet2DConditionModel) -> int:
    """How many tensors there are that could be a float weight of a layer with another dtype."""
    shapes = {layer.weight.shape for layer in unet.modules() if isinstance(layer, LAYERS)}
    own = {id(parameter) for parameter in unet.parameters()}
    gc.collect()
    return sum(
        type(found) in (torch.Tensor, nn.Parameter)
        and found.is_floating_point()
        and found.dtype.itemsize > 1
        and found.shape in shapes
        and id(found) not in own
        for found in gc.get_objects()
    )


@casts
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("storage", [FP8, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@torch.no_grad()
def test_layers_are_quantized_from_their_float8_weights(
    cast: Cast, precision: str, storage: torch.dtype, inductor: EagerInductor, quantized_dtypes: list[torch.dtype]
) -> None:
    torch._dynamo.utils.counters.clear()
    unet = in_float8(cast, storage)
    expected = result_of(unet)
    step, result = run(unet, precision=precision)
    assert 0 < relative_error(result, expected) < CLOSE
    assert dynamo_graphs() == 1
    (report,) = oq.reports()
    assert report.phase == "quantized", report.phase_reason
    assert all(decision.quantized or "cheap" in decision.reason for decision in layers(report))
    assert inductor.quantized_ops() > 10
    assert set(quantized_dtypes) == {storage}
    assert floats_alive(unet) == 0
    assert torch.equal(result_of(step), result)


@casts
@pytest.mark.parametrize("change", ["in place", "as data", "another parameter"])
@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_changes_of_float8_weights_are_seen(cast: Cast, change: str) -> None:
    unet = in_float8(cast)
    step, before = run(unet)
    for name, layer in unet.named_modules():
        if name.endswith(ADAPTED):
            other = layer.weight.view(torch.uint8).flip(0).view(FP8)  # of activations of the same size
            if change == "in place":
                layer.weight.copy_(other)
            elif change == "as data":
                layer.weight.data.copy_(other)
            else:
                layer.weight = nn.Parameter(other, requires_grad=False)
    expected = result_of(unet)
    for _ in range(2):  # the first shows that ranges have changed as well
        result = result_of(step)
    assert relative_error(expected, before) > 2 * CLOSE
    assert relative_error(result, expected) < CLOSE
    assert len(oq.reports()) == 1 and oq.reports()[0].phase == "quantized"


@casts
@pytest.mark.usefixtures("inductor", "hosted")
@torch.no_grad()
def test_float8_weights_move_to_the_host(cast: Cast) -> None:
    unet = in_float8(cast)
    expected = result_of(unet)
    run(unet)
    (report,) = oq.reports()
    quantized = {f"{decision.name}.weight" for decision in report.decisions if decision.quantized}
    assert on_host(unet) == quantized
    assert all(unet.get_parameter(name).dtype == FP8 for name in quantized)
    assert torch.equal(result_of(unet), expected)
    # Calls in float read copies.
    host_weights.move_to_host(list(unet.parameters()))
    torch._dynamo.reset()
    oq.reset()
    assert torch.equal(result_of(compiled(unet, {"calibration_steps": 9})), expected)


@casts
@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_the_cache_knows_a_float8_model(cast: Cast) -> None:
    first = run(in_float8(cast))[1]
    torch._dynamo.reset()
    oq.reset()
    step = compiled(in_float8(cast))
    assert torch.equal(result_of(step), first)
    (report,) = oq.reports()
    assert (report.calls_observed, report.cache_hit) == FOUND


@casts
@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_float8_weights_may_be_given_up(cast: Cast) -> None:
    unet = in_float8(cast)
    step, result = run(unet, free_float_weights=True)
    assert torch.equal(result_of(step), result)
    unet.time_embedding.linear_1.weight.copy_(torch.ones(()))
    with pytest.raises(FreedWeightsError):
        result_of(step)
