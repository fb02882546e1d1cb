"""diffusers' layerwise casting as a part of what layers compute."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.runtime.casting_hooks import cast_in_graph
from tests.helpers.eager_inductor import dynamo_graphs
from tests.helpers.small import CLOSE, X, compiled, small
from tests.helpers.tiny import noise, relative_error

STORED = torch.float8_e4m3fn
KINDS = [
    (nn.Linear(8, 4), noise(3, 8)),
    (nn.Conv1d(8, 4, 3, padding_mode="circular", padding=1), noise(1, 8, 9)),
    (nn.Conv2d(8, 4, 3, stride=2, bias=False), noise(1, 8, 9, 9)),
    (nn.Conv3d(8, 4, 3), noise(1, 8, 5, 5, 5)),
    (nn.ConvTranspose1d(8, 4, 3), noise(1, 8, 9)),
    (nn.ConvTranspose2d(8, 4, 3), noise(1, 8, 9, 9)),
    (nn.ConvTranspose3d(8, 4, 3), noise(1, 8, 5, 5, 5)),
    (nn.Embedding(8, 4, padding_idx=0), torch.arange(8)),
]


def cast(model: nn.Module, storage: torch.dtype = STORED, compute: torch.dtype = torch.float32) -> None:
    apply_layerwise_casting(model, storage_dtype=storage, compute_dtype=compute, skip_modules_pattern=())


@pytest.mark.parametrize(("layer", "x"), KINDS, ids=[type(layer).__name__ for layer, _ in KINDS])
@torch.no_grad()
def test_every_kind_of_layer_computes_what_it_did(layer: nn.Module, x: torch.Tensor) -> None:
    cast(layer)
    expected = layer(x)
    weight = layer.weight
    pointer = weight.data_ptr()
    assert cast_in_graph(layer) == 1
    assert cast_in_graph(layer) == 0  # it is
    for step in (layer, torch.compile(layer, backend="eager", fullgraph=True)):
        assert torch.equal(step(x), expected)
    assert layer.weight is weight and (weight.dtype, weight.data_ptr()) == (STORED, pointer)


@torch.no_grad()
def test_a_layer_that_is_running_keeps_its_hook_until_it_is_at_rest() -> None:
    layer = nn.Linear(8, 4)
    cast(layer)
    hook = layer._diffusers_hook.hooks["layerwise_casting"]
    hook.pre_forward(layer)
    assert cast_in_graph(layer) == 0
    hook.post_forward(layer, None)
    assert cast_in_graph(layer) == 1


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@torch.no_grad()
def test_a_layer_of_another_kind_keeps_its_hook_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "onlinequant")
    model = nn.Sequential(nn.Linear(8, 8), Doubled(8, 4))
    cast(model)
    expected = model(noise(3, 8))
    assert cast_in_graph(model) == 1
    assert torch.equal(model(noise(3, 8)), expected)
    (record,) = caplog.records
    assert "of Doubled it cannot be traced" in record.getMessage()


@pytest.mark.usefixtures("inductor")
def test_a_model_that_is_trained_keeps_its_hooks() -> None:
    model = small().requires_grad_(True)
    cast(model, torch.bfloat16)
    compiled(model)(X)
    assert cast_in_graph(model) == 3  # it was not done before


@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_hooks_that_are_added_later_are_a_part_of_the_next_graph() -> None:
    torch._dynamo.utils.counters.clear()
    model = small()
    step = compiled(model)
    step(X)
    cast(model)
    expected = model(X)
    for _ in range(4):
        result = step(X)
    assert 0 < relative_error(result, expected) < CLOSE
    assert oq.reports()[-1].phase == "quantized"
    assert dynamo_graphs() == 2
