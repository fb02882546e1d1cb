"""Layers of ComfyUI that multiply 8-bit numbers themselves leave that to the backend while it runs them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onlinequant_backend.comfy_integration import own_products
from tests.comfy import server
from tests.helpers.tiny import noise
from tests.helpers.wrapped_weights import QuantizedTensor, wrapped


class Layer(nn.Linear):
    """What is looked at of ComfyUI's layer."""

    def __init__(self, layout: str | None = "TensorCoreFP8E4M3Layout", full_precision: bool = False) -> None:
        super().__init__(16, 8)
        self.layout_type = layout
        self._full_precision_mm = full_precision
        if layout is not None:
            self.weight = nn.Parameter(wrapped(QuantizedTensor, noise(8, 16)), requires_grad=False)
            self.weight._layout_cls = layout


def switches(model: nn.Module) -> list[bool]:
    return [layer._full_precision_mm for layer in model]


def test_only_layers_that_the_backend_can_read_are_switched() -> None:
    model = nn.Sequential(Layer(), Layer("TensorCoreNVFP4Layout"), Layer(None), Layer(full_precision=True))
    for _ in range(2):
        with own_products.replaced(model):
            assert switches(model) == [True, False, False, True]
        assert switches(model) == [False, False, False, True]
    with pytest.raises(KeyError), own_products.replaced(model):
        raise KeyError
    assert switches(model) == [False, False, False, True]


def test_other_models_are_left_alone() -> None:
    with own_products.replaced(nn.Sequential(nn.Linear(4, 4), nn.Identity())):
        pass


def test_plain_weights_are_no_products() -> None:
    layer = Layer()
    layer.weight = nn.Parameter(torch.zeros(8, 16))
    with own_products.replaced(nn.Sequential(layer)):
        assert layer._full_precision_mm  # a LoRA has made it float, for which it makes no difference


@pytest.mark.comfy
def test_a_quantized_checkpoint() -> None:
    server.run_script("quantized_checkpoint.py")
