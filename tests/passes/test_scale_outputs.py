from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.passes.scale_outputs import scale_outputs
from tests.helpers.graph_probe import SYMMETRIC, GraphProbe
from tests.helpers.small import CLOSE, FOUND, compiled
from tests.helpers.tiny import noise, relative_error

X = noise(6, 16)
ONE, ROWS = (), (16, 1)


class Scaled(nn.Module):
    """A layer that multiplies its weight by a scale, as loaders of scaled checkpoints have it."""

    def __init__(
        self, shape: tuple[int, ...] = ONE, values: torch.dtype = torch.float8_e4m3fn, bias: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        weight = noise(16, 16, seed=seed) / 4
        scale = weight.abs().amax(1, keepdim=True) if shape == ROWS else weight.abs().max().view(shape)
        scale = scale / (448 if values.is_floating_point else 127)
        self.weight = nn.Parameter((weight / scale).to(values), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(noise(16, seed=9), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Late(Scaled):
    """Its product is cast, and the scale comes first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, (self.scale * self.weight.float()).to(x.dtype), self.bias)


class Number(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * 0.01, self.bias)


class PerInput(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.view(-1))


REWRITTEN = [
    Scaled(ONE),
    Scaled((1,), bias=False),
    Scaled((1, 1)),
    Scaled(ROWS),
    Scaled(ROWS, torch.int8),
    Late(ROWS),
    Number(),
]


@pytest.mark.parametrize("layer", REWRITTEN, ids=lambda layer: f"{type(layer).__name__} {list(layer.scale.shape)}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_scaled_instead(layer: Scaled, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    if dtype == torch.bfloat16 and layer.bias is not None:
        layer.bias.data = layer.bias.data.bfloat16()
    expected = layer(x) if type(layer) is not Scaled or layer.scale.dim() == 0 else None
    if expected is None:  # torch has no linear of mixed dtypes
        layer.scale = layer.scale.to(dtype)
        expected = layer(x)
    probe = GraphProbe(layer, x)
    assert probe.run(scale_outputs) == {"scale_outputs": 1}
    (result,) = probe.call()
    assert result.dtype == expected.dtype
    assert relative_error(result, expected) < (1e-6 if dtype == torch.float32 else 0.01)
    floats = [node.meta["example_value"] for node in probe.graph_module.graph.nodes if node.op != "output"]
    assert sum(value.shape == (16, 16) and value.dtype.itemsize > 1 for value in floats) <= 2  # the casts of the weight
    probe.assert_settled(scale_outputs)


def refused() -> list[tuple[nn.Module, torch.Tensor]]:
    half = Scaled(bias=False)
    half.scale = half.scale.half()
    wide = Scaled()
    wide.weight = nn.Parameter(noise(16, 16), requires_grad=False)
    return [(half, X.half()), (wide, X), (PerInput(ROWS), X), (nn.Linear(16, 16), X)]


@pytest.mark.parametrize(("layer", "x"), refused(), ids=["float16", "a float weight", "per input", "no scale"])
def test_others_are_left_alone(layer: nn.Module, x: torch.Tensor) -> None:
    assert GraphProbe(layer, x).run(scale_outputs) == {"scale_outputs": 0}


def model(values: torch.dtype, shape: tuple[int, ...]) -> Any:
    return nn.Sequential(*(each for seed in range(3) for each in (Scaled(shape, values, seed=seed), nn.SiLU()))).eval()


@pytest.mark.parametrize("shape", [ONE, ROWS], ids=["one", "rows"])
@pytest.mark.parametrize("values", [torch.float8_e4m3fn, torch.int8], ids=["float8", "int8"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_scaled_layers_run_in_8_bit_and_follow_weight_and_scale(
    precision: str, values: torch.dtype, shape: tuple[int, ...]
) -> None:
    layers = model(values, shape)
    step = compiled(layers, precision=precision)
    for _ in range(3):
        result = step(X)
    assert 0 < relative_error(result, layers(X)) < CLOSE
    assert all(decision.quantized for decision in oq.reports()[-1].decisions)
    layers[2].scale.neg_()
    layers[4].weight.copy_(layers[4].weight.view(torch.uint8).flip(0).view(values))
    for _ in range(2):
        changed = step(X)
    assert relative_error(changed, layers(X)) < CLOSE < relative_error(changed, result)

    expected = model(values, shape)(X)
    torch._dynamo.reset()
    oq.reset()
    assert relative_error(compiled(model(values, shape), precision=precision)(X), expected) < CLOSE
    assert (oq.reports()[-1].calls_observed, oq.reports()[-1].cache_hit) == FOUND


def test_a_model_s_last_layer_is_still_known_as_that() -> None:
    model = nn.Sequential(nn.Linear(16, 512), nn.Linear(512, 16), Scaled(ROWS)).requires_grad_(False)
    infos = GraphProbe(model, X, precision=SYMMETRIC[1]).analyze().infos
    assert [info.quantized for info in infos] == [True, True, False]
    assert infos[-1].reason.startswith("the model's last layer")
