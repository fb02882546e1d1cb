"""What a model takes of a GPU's memory, and its float weights on the host, in step with ComfyUI's ``ModelPatcher``.

A model that runs in 8 bit has the float weights of its 8-bit layers in host memory. ComfyUI moves models off the GPU
and back: such weights need not be copied then. A model that does not fit the GPU in float has its weights there from
the start, so that ComfyUI need not load it in part.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

import onlinequant_backend as oq
from onlinequant_backend.best_effort import best_effort

# The bytes of each model's own weights; of its 8-bit copies, and of its weights on the host, at the last check.
_own_sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_copy_sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_host_sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def module_of(patcher: Any) -> Any:
    """The compiled module: the denoiser, or a ControlNet's network."""
    return getattr(patcher.model, "diffusion_model", patcher.model)


def size(patcher: Any, own_size: int | None) -> int:
    """The bytes that a model needs of the GPU, with its 8-bit copies; also while it is not loaded. ``own_size``: of its
    float weights; None for the one given before."""
    model, module = patcher.model, module_of(patcher)
    if own_size is not None:
        _own_sizes[model] = own_size
    copies, hosted = oq.copied_bytes(module), oq.host_bytes(module)
    if copies:
        _copy_sizes[model] = copies
    if copies or hosted or _is_loaded(model):  # else they will be back when it is loaded
        _host_sizes[model] = hosted
    return _own_sizes[model] - _host_sizes.get(model, 0) + _copy_sizes.get(model, 0)


def is_size_known(patcher: Any) -> bool:
    """Whether ``size`` was called for a model."""
    return patcher.model in _own_sizes


def loaded_size(patcher: Any, loaded: int) -> int:
    """As ``size``, for the part that is on the GPU; ``loaded``: the bytes that ComfyUI has loaded, which it takes from
    ``size`` if that is the whole model."""
    model, module = patcher.model, module_of(patcher)
    own = _own_sizes.get(model, loaded)
    if getattr(model, "model_lowvram", False):
        own = min(loaded, own)
    return (max(0, own - oq.host_bytes(module)) if loaded else 0) + oq.copied_bytes(module)


def place(patcher: Any, device: torch.device, free: float) -> None:
    """Before ComfyUI loads a model: those of its weights that were on the host stay there; all do if its own weights do
    not fit into ``free`` bytes otherwise."""
    from onlinequant_backend.quantization import host_weights

    model, module = patcher.model, module_of(patcher)
    if device.type != "cuda" or _is_loaded(model):
        return
    with best_effort("the float weights of %s are loaded onto the GPU", type(model).__name__):
        kept = list(filter(host_weights.was_on_host, module.parameters()))
        if free < _own_sizes.get(model, 0) - sum(weight.nbytes for weight in kept):
            oq.place(module, device)
        else:
            host_weights.load_on_host(kept, device)
        _host_sizes[model] = oq.host_bytes(module)


def _is_loaded(model: Any) -> bool:
    return bool(getattr(model, "model_loaded_weight_memory", 0) > 0)


def take_off(patcher: Any, device: torch.device | None) -> None:
    """Before ComfyUI moves a model to ``device``: if that is the CPU, weights on the host stay where they are."""
    if device is not None and torch.device(device).type == "cpu" and oq.host_bytes(module_of(patcher)):
        oq.place(module_of(patcher), "cpu")


def before_patch(patcher: Any, key: str) -> torch.device | None:
    """Before ComfyUI patches a weight: if it is on the host, makes a tensor of the CPU of it, of which a backup is no
    copy. Returns the GPU that has read it; None if it was not on the host."""
    from onlinequant_backend.quantization import host_weights

    weight = _weight(patcher, key)
    device = None if weight is None else weight.device
    return device if weight is not None and host_weights.leave_on_host([weight]) else None


def after_patch(patcher: Any, key: str, device: torch.device) -> None:
    """After ComfyUI has patched a weight that was on the host, or failed to: what is there now goes to the host."""
    from onlinequant_backend.quantization import host_weights

    weight = _weight(patcher, key)
    if weight is not None:
        with best_effort("a patched weight stays on the GPU"):
            host_weights.load_on_host([weight], device)
            host_weights.move_to_host([weight])


def free_unused() -> None:
    """Give back the host memory of weights that no longer exist."""
    from onlinequant_backend.quantization import host_weights

    with best_effort("host memory that is no longer used stays page-locked"):
        host_weights.free_unused()


def _weight(patcher: Any, key: str) -> torch.Tensor | None:
    owner, _, name = key.rpartition(".")
    try:
        weight = getattr(patcher.model.get_submodule(owner), name, None)
    except AttributeError:
        return None
    return weight if isinstance(weight, torch.Tensor) else None
