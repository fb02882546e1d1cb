"""Moves a model to a GPU with its float weights in host memory, in place of another library's offload hooks."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InvalidOptionError
from ..quantization import host_weights
from ..quantization.host_weights import HostMemoryError
from ..tensors import numbered
from .accelerate_hooks import AccelerateHooks
from .group_hooks import GroupHooks
from .offload_hooks import OffloadHooks, weights_of


def place(module: nn.Module, device: torch.device | str = "cuda") -> nn.Module:
    """Move ``module`` to a GPU as ``module.to(device)`` does, except for the weights of its convolutions and linear
    layers: these stay in host memory, where the GPU reads them. So a model that fits the GPU only in 8 bit can be
    compiled. It is slow until it runs in 8 bit, unless it is compiled with this backend, which copies weights ahead.
    With device "cpu", moves it back, without copying these weights. Returns ``module``.

    Offload hooks of accelerate and diffusers are removed; one stays that moves the inputs. Raises OffloadHooksError
    for those that cannot be removed safely, InvalidOptionError for a device that cannot read host memory, and
    MemoryError if the host has too little.
    """
    to = numbered(device)
    can_read = host_weights.supports(to)
    if not can_read and to.type != "cpu":
        raise InvalidOptionError(
            f"device is {str(device)!r}, which cannot read host memory: "
            "give an NVIDIA GPU or 'cpu', or use module.to(device)."
        )
    hooks = offload_hooks(module)
    if hooks is not None:
        replace(module, hooks, to)
    elif can_read:
        host_weights.load_on_host(weights_of(_layers(module)), to)
    else:
        host_weights.leave_on_host(list(module.parameters()))
    return module if hooks is not None else module.to(to)


def offload_hooks(module: nn.Module) -> OffloadHooks | None:
    """The hooks of a model; None if it has none. Raises OffloadHooksError for hooks that cannot be replaced."""
    root = getattr(module, "_orig_mod", module)
    return AccelerateHooks.of(root) or GroupHooks.of(root)


@torch.inference_mode(False)
@torch.no_grad()
def replace(module: nn.Module, hooks: OffloadHooks, device: torch.device) -> None:
    """Remove the hooks of a model and move it to ``device`` as ``place`` does. Without the memory for that, raises
    HostMemoryError and leaves the model as it is."""
    held = hooks.weights(_layers(module))
    try:
        host_weights.load_on_host(held, device)
    except HostMemoryError:
        host_weights.leave_on_host(held)
        raise
    # As tensors of the CPU they are put back into the model without a copy.
    host_weights.leave_on_host(held)
    hooks.remove(device)
    host_weights.load_on_host(weights_of(_layers(module)), device)
    module.to(device)


def _layers(module: nn.Module) -> list[nn.Module]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [layer for layer in module.modules() if isinstance(layer, kinds)]
