"""ComfyUI's own products of 8-bit numbers, which a layer of a ``comfy_quant`` checkpoint computes where a GPU can.

Such a layer quantizes its input into a tensor of a class that no graph may return, so that Dynamo breaks the graph at
each of them. ComfyUI's switch for "full precision" has the layer multiply its input by its weight as it is instead.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch

_SWITCH = "_full_precision_mm"
# The layers of each model that have the switch.
_layers: weakref.WeakKeyDictionary[torch.nn.Module, list[torch.nn.Module]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def replaced(module: torch.nn.Module) -> Iterator[None]:
    """Within the block, layers whose weights the backend can read leave products of 8-bit numbers to it."""
    if module not in _layers:  # there are thousands of modules, and this runs at every call
        _layers[module] = [layer for layer in module.modules() if layer is not module and hasattr(layer, _SWITCH)]
    layers = [layer for layer in _layers[module] if _multiplies_in_8_bit(layer)]
    for layer in layers:
        setattr(layer, _SWITCH, True)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, _SWITCH, False)


def _multiplies_in_8_bit(layer: torch.nn.Module) -> bool:
    from onlinequant_backend.quantization import stored_weights  # the nodes load with any torch

    weight = layer._parameters.get("weight")
    is_on = getattr(layer, _SWITCH) is False and getattr(layer, "layout_type", None) is not None
    return is_on and weight is not None and stored_weights.unreadable(weight) is None
