"""Channels far larger than the others: shrunk before they are quantized, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.quantization.smoothing import smoothing_factors
from onlinequant_backend.runtime.set_registry import known_sets
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.small import CLOSE, compiled
from tests.helpers.tiny import Net, net, noise, relative_error

X = noise(1, 4, 8, 8)


def with_outliers(seed: int = 0, scale: float = 100) -> Net:
    """A net whose norm gives two large channels, which weigh no more than the others."""
    model = net(seed)
    block = model.blocks[0]
    with torch.no_grad():
        for tensor in (block.norm.weight, block.norm.bias):
            tensor[[3, 8]] *= scale
        block.conv.weight[:, [3, 8]] /= scale
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_channels_that_stand_out_are_shrunk(dtype: torch.dtype) -> None:
    x = noise(2, 16, 8, 8, dtype=dtype)
    weight = noise(32, 16, 3, 3, dtype=dtype)
    assert smoothing_factors(x, weight) is None
    x[:, 5] *= 64
    factors = smoothing_factors(x, weight)
    assert factors is not None and factors.shape == (1, 16, 1, 1) and factors.dtype == torch.float32
    assert (factors.flatten() == 1).nonzero().flatten().tolist() == [i for i in range(16) if i != 5]
    # With weights as large as the others', half of it, as powers, goes over to them.
    assert float(factors[0, 5, 0, 0]) in (1 / 16, 1 / 8, 1 / 4)
    weight[:, 5] /= 64
    factors = smoothing_factors(x, weight)
    assert factors is not None and float(factors[0, 5, 0, 0]) in (1 / 128, 1 / 64, 1 / 32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_may_be_kept_in_float8(dtype: torch.dtype) -> None:
    x, weight = noise(3, 7, 16), noise(32, 16).to(dtype)
    x[..., 2] *= 100
    factors, expected = smoothing_factors(x, weight), smoothing_factors(x, weight.float())
    assert factors is not None and expected is not None and torch.equal(factors, expected)


def test_the_channels_of_rows_are_the_last_dimension() -> None:
    x, weight = noise(3, 7, 16), noise(32, 16)
    x[..., 2] *= 100
    factors = smoothing_factors(x, weight)
    assert factors is not None and factors.shape == (16,)
    assert (factors < 1).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("spoil", [0.0, torch.inf, torch.nan])
def test_what_has_no_typical_channel_is_left_alone(spoil: float) -> None:
    x, weight = noise(3, 7, 16), noise(32, 16)
    x[..., 2] *= 100
    x[..., :9] = spoil
    assert smoothing_factors(x, weight) is None


@pytest.mark.parametrize("format", [ONEDNN, INT8], ids=["onednn", "int8"])
def test_a_layer_with_outliers_is_as_good_as_one_without(format: object) -> None:
    x, weight = noise(64, 32), noise(48, 32, seed=2)
    errors = []
    for scale in (1, 50):
        large, small = x.clone(), weight.clone()
        large[:, 7] *= scale
        small[:, 7] /= scale
        layer = Layer(None, format, "mse")
        layer.observe(large, small)
        layer.freeze()
        layer.refresh(small)
        y = nn.functional.linear(large, small)
        errors.append(relative_error(layer.quantized_output(large, None, y), y))
        assert (layer.smoothing is None) == (scale == 1)
    assert errors[1] < 1.2 * errors[0]


def test_floating_formats_need_none() -> None:
    x = noise(64, 32)
    x[:, 7] *= 100
    layer = Layer(None, FP8, "mse")
    layer.observe(x, noise(48, 32))
    assert layer.smoothing is None


@torch.no_grad()
def test_a_model_with_outliers_is_as_good_as_one_without(inductor: EagerInductor) -> None:
    model = with_outliers()
    step = compiled(model)
    for _ in range(2):
        step(X)
    assert 0 < relative_error(step(X), model(X)) < CLOSE
    inputs = [node.name for node in inductor.graphs[-1].graph.find_nodes(op="placeholder")]
    assert sum("smoothing" in name for name in inputs) == 1
    # A changed weight is divided by the same factors.
    model.blocks[0].conv.weight.mul_(0.9)
    assert 0 < relative_error(step(X), model(X)) < CLOSE
    assert len(inductor.graphs) == 1


@torch.no_grad()
def test_another_process_smooths_alike(inductor: EagerInductor, tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        oq.reset()
        torch._dynamo.reset()
        model = with_outliers()
        step = compiled(model, cache_dir=str(tmp_path))
        for _ in range(3):
            result = step(X)
        results.append(result)
    assert oq.reports()[-1].cache_hit
    assert torch.equal(*results)


@torch.no_grad()
def test_two_models_of_one_graph_may_be_smoothed_differently(inductor: EagerInductor) -> None:
    """Dynamo may hand weights of another checkpoint to a graph; here they replace the first ones, one by one."""
    plain, other = net(), with_outliers(seed=3)
    expected = plain(X), other(X)
    model = copy.deepcopy(plain)
    step = compiled(model)
    for _ in range(2):
        step(X)
    assert relative_error(step(X), expected[0]) < CLOSE
    for name, parameter in other.named_parameters():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(parameter.clone(), requires_grad=False))
    for _ in range(2):
        step(X)
    assert 0 < relative_error(step(X), expected[1]) < CLOSE
    assert any(layer.smoothing is not None for weights in known_sets for layer in weights.layers)
