"""Hooks of other libraries that keep a model's weights off the GPU between the calls of its layers."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn

from ..errors import OffloadHooksError
from ..tensors import numbered


class OffloadHooks(Protocol):
    """The hooks of one model, whose weights are on the CPU while no layer runs.

    Attributes:
        device: where the model runs.
        offload: whether they move weights at all, or only inputs.
    """

    device: torch.device
    offload: bool

    def weights(self, layers: Iterable[nn.Module]) -> list[torch.Tensor]:
        """The tensors that hold the weights of ``layers`` while these do not run."""

    def remove(self, device: torch.device) -> None:
        """Remove the hooks and have the model hold its weights. What remains moves its inputs to ``device``."""


def weights_of(layers: Iterable[nn.Module]) -> list[torch.Tensor]:
    """The weights of layers as they are."""
    return [cast("torch.Tensor", layer.weight) for layer in layers]


def only_device(devices: Iterable[int | str | torch.device | None]) -> torch.device:
    """The one device of all hooks. Raises OffloadHooksError if there are several."""
    found = {numbered(device) for device in devices if device is not None}
    if len(found) != 1:
        raise OffloadHooksError(f"they use {len(found)} devices, not one: {sorted(map(str, found))}")
    return found.pop()


def require(is_so: bool, otherwise: str, *details: object) -> None:
    """Raise OffloadHooksError if hooks are not as they must be to be replaced."""
    if not is_so:
        raise OffloadHooksError(otherwise % details)


def require_plain(tensors: Iterable[torch.Tensor]) -> None:
    """Raise OffloadHooksError if any tensor is one that libraries move in ways of their own."""
    for tensor in tensors:
        require(type(tensor) in (torch.Tensor, nn.Parameter), "there is a weight of type %s", type(tensor).__name__)


def require_outermost(module: nn.Module, source: str) -> None:
    """Raise OffloadHooksError unless ``module.forward`` was put there by the Python module ``source``: to remove its
    hook would also remove what was put there later."""
    forward: Any = vars(module).get("forward")
    is_outermost = isinstance(forward, functools.partial) and getattr(forward.func, "__module__", None) == source
    require(is_outermost, "the forward method of a %s was replaced after they were added", type(module).__name__)


def restore_forward(modules: Sequence[nn.Module]) -> None:
    """Drop attributes that are nothing but the class's ``forward`` method, which a removed hook leaves behind."""
    for module in modules:
        forward: Any = vars(module).get("forward")
        if isinstance(forward, types.MethodType) and forward == types.MethodType(type(module).forward, module):
            del module.forward
