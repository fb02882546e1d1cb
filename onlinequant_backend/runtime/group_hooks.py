"""The group offloading of diffusers: ``apply_group_offloading``, ``enable_group_offload``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .offload_hooks import only_device, require, require_outermost, require_plain, restore_forward, weights_of

_SOURCE = "diffusers.hooks.hooks"
_OFFLOADING = "group_offloading"
_REMOVED = ("lazy_prefetch_group_offloading", "layer_execution_tracker", _OFFLOADING)
_INPUTS = "onlinequant_inputs"
# Those that stay. What others do to the forward method may not survive the removal of one below them.
_KEPT = {"layerwise_casting", _INPUTS}


class GroupHooks:
    """The hooks of one model. They move the weights in place, so that the model holds them at all times.

    Attributes:
        device: where the model runs.
        offload: true.
    """

    offload = True

    def __init__(self, root: nn.Module, registries: Mapping[nn.Module, Any]) -> None:
        self._root = root
        self._registries = registries.values()
        self._groups = {id(hook.group): hook.group for hook in self._hooks()}
        self.device = only_device(group.onload_device for group in self._groups.values())
        for module, registry in registries.items():
            require("_hf_hook" not in vars(module), "a %s also has a hook of accelerate", type(module).__name__)
            others = registry.hooks.keys() - _KEPT - set(_REMOVED)
            require(not others, "a %s also has %s", type(module).__name__, ", ".join(others))
            require_outermost(registry._module_ref, _SOURCE)
        self._require_all_of_the_model()

    @staticmethod
    def of(root: nn.Module) -> GroupHooks | None:
        """Those of a model; None if it has none. Raises OffloadHooksError for hooks that cannot be replaced."""
        found = {module: vars(module).get("_diffusers_hook") for module in root.modules()}
        registries = {module: each for module, each in found.items() if each is not None and _OFFLOADING in each.hooks}
        return GroupHooks(root, registries) if registries else None

    def _hooks(self) -> list[Any]:
        return [registry.hooks[_OFFLOADING] for registry in self._registries]

    def _require_all_of_the_model(self) -> None:
        """Groups are moved as a whole, and one begins to move the next one."""
        for group in self._groups.values():
            require(group.offload_to_disk_path is None, "weights are in files")
            require(torch.device(group.offload_device).type == "cpu", "weights are on %s", group.offload_device)
        moved = {id(hook.next_group) for hook in self._hooks() if hook.next_group is not None}
        waiting = {key for key, group in self._groups.items() if not group.onload_self}
        require(moved <= self._groups.keys() and waiting <= moved, "weights are moved with those of other modules")
        ours = {id(tensor) for tensor in [*self._root.parameters(), *self._root.buffers()]}
        for group in self._groups.values():
            inner = [tensor for module in group.modules for tensor in [*module.parameters(), *module.buffers()]]
            tensors = [*inner, *group.parameters, *group.buffers]
            require_plain(tensors)
            require({id(tensor) for tensor in tensors} <= ours, "weights are moved with those of other modules")
        are_excluded = any(getattr(hook.config, "exclude_kwargs", None) for hook in self._hooks())
        require(not are_excluded, "some inputs are excluded")

    def weights(self, layers: Iterable[nn.Module]) -> list[torch.Tensor]:
        """The tensors that hold the weights of ``layers`` while these do not run."""
        return weights_of(layers)

    def remove(self, device: torch.device) -> None:
        """Remove the hooks. Another one moves the root's inputs to where its weights are."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # weights may be on their way
        own = vars(self._root).get("_diffusers_hook")
        if own is not None and _OFFLOADING in own.hooks:
            _replace_in_place(own)
        for registry in self._registries:
            for name in _REMOVED:
                registry.remove_hook(name, recurse=False)
        restore_forward([registry._module_ref for registry in self._registries])
        registry = sys.modules[_SOURCE].HookRegistry.check_if_exists_or_initialize(self._root)
        if _INPUTS not in registry.hooks:
            registry.register_hook(_inputs_hook()(), _INPUTS)


def _replace_in_place(registry: Any) -> None:
    """Replace the root's hook by one for its inputs, in a call that may have begun."""
    registry.remove_hook(_INPUTS, recurse=False)
    replaced = registry.hooks.pop(_OFFLOADING)
    registry._hook_order[registry._hook_order.index(_OFFLOADING)] = _INPUTS
    registry.hooks[_INPUTS] = hook = _inputs_hook()()
    hook.fn_ref = replaced.fn_ref
    hook.fn_ref.pre_forward, hook.fn_ref.post_forward = hook.pre_forward, hook.post_forward
    for name in registry.hooks.keys() & set(_REMOVED):  # that call goes on with what they have become
        without = sys.modules[_SOURCE].ModelHook()
        unused = registry.hooks[name].fn_ref
        unused.pre_forward, unused.post_forward = without.pre_forward, without.post_forward


@functools.cache
def _inputs_hook() -> type:
    base: Any = sys.modules[_SOURCE].ModelHook

    class InputsHook(base):
        @torch.compiler.disable
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            device = next(module.parameters()).device
            return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))

    return InputsHook
