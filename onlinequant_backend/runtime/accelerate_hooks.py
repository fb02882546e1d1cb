"""accelerate's ``AlignDevicesHook``: ``cpu_offload``, ``dispatch_model``, ``enable_sequential_cpu_offload``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .offload_hooks import only_device, require, require_outermost, require_plain, restore_forward, weights_of

_SOURCE = "accelerate.hooks"


class AccelerateHooks:
    """The hooks of one model. Between the calls of its layer a weight is a tensor without values in the module, and a
    tensor of the CPU in the hook.

    Attributes:
        device: where the model runs.
        offload: whether any of them moves weights.
    """

    def __init__(self, root: nn.Module, hooks: Mapping[nn.Module, list[Any]]) -> None:
        self._root = root
        self._hooks = hooks
        each = [hook for chain in hooks.values() for hook in chain]
        for module, chain in hooks.items():
            kinds = {type(hook).__name__ for hook in chain if type(hook) is not _library().AlignDevicesHook}
            require(not kinds, "a %s also has a %s", type(module).__name__, ", ".join(kinds))
            if module is not root:
                require_outermost(module, _SOURCE)
        self.device = only_device(hook.execution_device for hook in each)
        self.offload = any(hook.offload for hook in each)
        self._stored = {(owner, name): value for owner, name, value in self._offloaded() if value is not None}
        self._require_values()

    @staticmethod
    def of(root: nn.Module) -> AccelerateHooks | None:
        """Those of a model; None if it has none. Raises OffloadHooksError for hooks that cannot be replaced."""
        if _library() is None:
            return None
        chains = {module: _flat(vars(module)["_hf_hook"]) for module in root.modules() if "_hf_hook" in vars(module)}
        hooks = {module: chain for module, chain in chains.items() if any(map(_is_aligning, chain))}
        return AccelerateHooks(root, hooks) if hooks else None

    def _offloaded(self) -> Iterator[tuple[nn.Module, str, torch.Tensor | None]]:
        """The module, the name and, where the hook has them in memory, the values of each tensor that is moved."""
        for module, chain in self._hooks.items():
            for hook in chain:
                for name in hook.original_devices if hook.offload else ():
                    path, _, own_name = name.rpartition(".")
                    yield module.get_submodule(path), own_name, _value(hook.weights_map, name)

    def _require_values(self) -> None:
        for module in self._root.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                value = self._stored.get((module, name))
                require(value is not None or not tensor.is_meta, "the values of %s are not in the memory", name)
                require_plain([tensor] if value is None else [tensor, value])
                if value is not None:
                    is_alike = (value.shape, value.dtype, value.device.type) == (tensor.shape, tensor.dtype, "cpu")
                    require(is_alike, "the values of %s have another kind than it has", name)

    def weights(self, layers: Iterable[nn.Module]) -> list[torch.Tensor]:
        """The tensors that hold the weights of ``layers`` while these do not run."""
        layers = list(layers)
        own = zip(layers, weights_of(layers), strict=True)
        return [self._stored.get((layer, "weight"), weight) for layer, weight in own]

    def remove(self, device: torch.device) -> None:
        """Remove the hooks and have the model hold its weights. The root keeps one that moves its inputs to ``device``,
        and its outputs back where they were moved back before: pipelines look there for the device."""
        library = _library()
        chain = self._hooks.get(self._root, [])
        keys = {key for hook in chain for key in _names(hook.skip_keys)}
        remaining = library.AlignDevicesHook(
            execution_device=device,
            io_same_device=any(hook.io_same_device for hook in chain),
            skip_keys=[*keys] or None,
        )
        for module, each in self._hooks.items():
            for hook in each:
                if hook.offload:  # not back to the GPU, where they came from
                    hook.original_devices = dict.fromkeys(hook.original_devices, torch.device("cpu"))
            if module is not self._root:
                library.remove_hook_from_module(module)
        restore_forward([module for module in self._hooks if module is not self._root])
        if not chain:
            library.add_hook_to_module(self._root, remaining)
            return
        # Replaced within the forward method that accelerate has made, which may be compiled itself.
        vars(self._root)["_hf_hook"].detach_hook(self._root)
        vars(self._root)["_hf_hook"] = remaining
        # Its methods change at their first call, after which they would be traced again.
        remaining.post_forward(self._root, remaining.pre_forward(self._root))
        for name in getattr(library, "_accelerate_added_attributes", ()):  # they warn of moving the model
            vars(self._root).pop(name, None)


def _library() -> Any:
    """``accelerate.hooks``; None if it is not loaded, so that no model can have its hooks."""
    return sys.modules.get(_SOURCE)


def _is_aligning(hook: Any) -> bool:
    return isinstance(hook, _library().AlignDevicesHook)


def _flat(hook: Any) -> list[Any]:
    is_sequence = isinstance(hook, _library().SequentialHook)
    return [inner for each in hook.hooks for inner in _flat(each)] if is_sequence else [hook]


def _names(keys: str | list[str] | None) -> list[str]:
    return [keys] if isinstance(keys, str) else keys or []


def _value(weights: Any, name: str) -> torch.Tensor | None:
    """The tensor in the memory that ``weights[name]`` returns; None if it is read from a file."""
    kinds = sys.modules["accelerate.utils.offload"]
    if isinstance(weights, kinds.PrefixedDataset):
        return _value(weights.dataset, f"{weights.prefix}{name}")
    values = weights.state_dict if isinstance(weights, kinds.OffloadedWeightsLoader) else weights
    found: torch.Tensor | None = values.get(name) if isinstance(values, dict) else None
    return found
