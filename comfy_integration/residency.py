"""Makes quantized models work with ComfyUI's memory management. ComfyUI loads the weights of most models on demand
("dynamic VRAM"), which compiled graphs do not support. So a model gets a *twin*, a copy whose weights are all loaded:
one for the lifetime of the model, with any LoRAs. Only one of the two is on the GPU at a time. A model that ComfyUI
unloads loses its 8-bit copies and CUDA graphs as well.

Parts of ComfyUI that are missing or not as expected are not used. ComfyUI is not imported, so that this can be tested
without it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import re
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.best_effort import best_effort

from . import gpu_memory

_log = logging.getLogger("onlinequant")

# ComfyUI's ``CallbacksMP``; every clone of a patcher has its callbacks, too.
ON_LOAD, ON_DETACH, KEY = "on_load_after", "on_detach_after", "onlinequant"
_EVERYTHING = 1e30  # bytes; ComfyUI's value for all memory

# For each model, a patcher of its twin that is not used for sampling. It represents the twin when no clone is left, and
# has no reference to the model, which it would keep alive.
_twins: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_originals: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def clone_in_place(model: Any) -> Any:
    """A clone of a ``ModelPatcher`` whose weights are all on the device on which the model runs, if possible.

    Clones of one model share one copy of it: its own, or that of its twin.
    """
    clone = _clone_of_twin(model) if _is_dynamic(model) else model.clone()
    if not _is_dynamic(clone):
        _make_resident(clone)
    for patcher in (model, clone):
        watch(patcher)
    return clone


def put_control_net_in_place(control: Any) -> None:
    """Have a ``ControlNet``, which must be this package's copy, run its twin's network, with all weights on its
    device."""
    patcher = getattr(control, "control_model_wrapped", None)
    if patcher is None:
        return
    watch(patcher)
    if _is_dynamic(patcher):
        with best_effort("a ControlNet stays in float, since ComfyUI loads its weights on demand"):
            known = _twin(patcher)
            watch(known)
            control.control_model_wrapped, control.control_model = known, known.model


# The attributes that ComfyUI's patchers set on modules, and set again when needed. ``device`` is also an attribute of
# some parts of models.
_LEFT_BEHIND = re.compile(
    r"_v(_signature)?|_pins?|_pin_state|_prefetch|dynamic_(vbars|pins|patchers)|seed_key"
    r"|(weight|bias)_(lowvram_)?function"
    r"|(prev_)?comfy_.*_weights|model_lowvram|lowvram_patch_counter|model_.*_memory|current_weight_patches_uuid"
)


def _twin(patcher: Any) -> Any:
    """The patcher that represents a model's twin."""
    model = patcher.model
    if model not in _twins:
        for loaded in (patcher, *(loaded.model for loaded in _loaded(model))):
            loaded.unpatch_model(loaded.offload_device, unpatch_weights=False)  # patches of the last run
        _unload_dynamic(patcher)  # so that all weights are on the CPU
        twin = _with_same_weights(model, {})
        vars(twin).pop("device", None)
        known = sys.modules["comfy.model_patcher"].ModelPatcher(twin, patcher.load_device, patcher.offload_device)
        _make_resident(known)
        _twins[model], _originals[known.model] = known, weakref.ref(model)
    return _twins[model]


def _with_same_weights(module: nn.Module, known: dict[int, Any]) -> nn.Module:
    """A copy whose parameters share the memory, until they are moved, without the attributes of ComfyUI's patchers.
    ``copy.deepcopy`` would copy pages and pinned memory, which both copies would free. ``known``: copies of modules and
    parameters by the originals' ``id``.
    """
    if id(module) not in known:
        twin = known[id(module)] = module.__new__(type(module))
        for name, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is not None and id(weight) not in known:
                known[id(weight)] = _same(weight, getattr(module, f"{name}_comfy_model_dtype", None))
        for name, value in vars(module).items():
            if not _LEFT_BEHIND.fullmatch(name):
                vars(twin)[name] = _of_twin(value, known)
    copied: nn.Module = known[id(module)]
    return copied


def _same(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor in the same memory. Weights loaded on demand have the file's dtype, and get ``dtype`` when they are
    used; ComfyUI itself converts weights that it stores with 8 bits."""
    same = tensor.detach()
    if dtype is not None and type(tensor) in (torch.Tensor, nn.Parameter):
        same = same.to(dtype)
    return nn.Parameter(same, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else same


def _of_twin(value: Any, known: dict[int, Any]) -> Any:
    """The value of an attribute in the copy of a module whose attribute is ``value``."""
    if isinstance(value, nn.Module):
        return _with_same_weights(value, known)
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, _of_twin(value.__self__, known))
    if isinstance(value, functools.partial):
        arguments = (_of_twin(item, known) for item in value.args)
        return functools.partial(_of_twin(value.func, known), *arguments, **_of_twin(value.keywords, known))
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({name: _of_twin(item, known) for name, item in value.items()})
        return copied
    if type(value) in (list, tuple, set):
        return type(value)(_of_twin(item, known) for item in value)
    return known.get(id(value), value)


def watch(patcher: Any) -> None:
    """Register for ComfyUI's loads and unloads of the model of a ``ModelPatcher``, also through its parents."""
    while hasattr(patcher, "add_callback_with_key"):
        for kind, callback in ((ON_LOAD, _after_load), (ON_DETACH, _after_detach)):
            if not patcher.get_callbacks(kind, KEY):
                patcher.add_callback_with_key(kind, KEY, callback)
        patcher = getattr(patcher, "parent", None)


def _is_dynamic(patcher: Any) -> bool:
    return hasattr(patcher, "is_dynamic") and bool(patcher.is_dynamic())


def _clone_of_twin(model: Any) -> Any:
    try:
        known = _twin(model)
        clone = model.clone(disable_dynamic=True, model_override=known.get_clone_model_override())
    except Exception as error:  # this version of ComfyUI works differently
        _log.warning(
            "this model's layers stay in float, since ComfyUI loads their weights on demand and not in the way that is "
            "known here (%s); start it with --disable-dynamic-vram",
            error,
        )
        return model.clone()
    # The patcher to which ComfyUI assigns a loaded model when the clone is deleted. The model's own is for another
    # copy.
    clone.parent = known
    clone.hook_backup = known.hook_backup
    clone.weight_inplace_update = False  # a LoRA would be written into the original's weights
    clone.size = 0  # recomputed on demand: the original's weights may have another dtype
    return clone


def _make_resident(patcher: Any) -> None:
    kind: Any = type(patcher)
    if not hasattr(kind, "made_resident"):
        patcher.__class__ = _resident(kind)


@functools.cache
def _resident(kind: Any) -> Any:
    """ComfyUI's ``ModelPatcher`` for a model that may be quantized; its clones have the same class."""

    class Resident(kind):
        made_resident = True

        def model_size(self) -> int:
            """What the model takes of the GPU, so that ComfyUI frees as much for it."""
            is_known = gpu_memory.is_size_known(self)
            return gpu_memory.size(self, None if is_known else super().model_size())

        def loaded_size(self) -> int:
            """As ``model_size``, for the loaded part."""
            return gpu_memory.loaded_size(self, super().loaded_size())

        def partially_load(self, device_to: Any, extra_memory: float = 0, *args: Any, **options: Any) -> Any:
            _unload_other_copy(self.model)  # before this one takes its memory
            if not any((*args, *options.values())):
                extra_memory += _take_patches_off(self, extra_memory)
            gpu_memory.place(self, device_to, extra_memory)
            return super().partially_load(device_to, extra_memory, *args, **options)

        def partially_unload(self, *args: Any, **options: Any) -> Any:
            released = _release(self)
            if oq.host_bytes(gpu_memory.module_of(self)):
                return released  # to move weights that are on the host would free nothing: ComfyUI unloads it whole
            return super().partially_unload(*args, **options)

        def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
            if unpatch_weights:
                gpu_memory.take_off(self, device_to)
            return super().unpatch_model(device_to, unpatch_weights)

        def patch_weight_to_device(self, key: str, *args: Any, **options: Any) -> Any:
            device = gpu_memory.before_patch(self, key) if key in self.patches else None
            try:
                return super().patch_weight_to_device(key, *args, **options)
            finally:
                if device is not None:
                    gpu_memory.after_patch(self, key, device)

        def patch_hook_weight_to_device(self, *args: Any, **options: Any) -> Any:
            _make_writable(self.model, *args, *options.values())
            return super().patch_hook_weight_to_device(*args, **options)

        def patch_cached_hook_weights(self, *args: Any, **options: Any) -> Any:
            _make_writable(self.model, *args, *options.values())
            return super().patch_cached_hook_weights(*args, **options)

        def pin_weight_to_device(self, key: str) -> Any:
            _make_writable(self.model, key)
            return super().pin_weight_to_device(key)

        def detach(self, *args: Any, **options: Any) -> Any:
            # ComfyUI loads in inference mode and may unload outside of it: the weights that it then restores after a
            # LoRA would be ordinary tensors, for which Dynamo traces again.
            is_inference = any(weight.is_inference() for weight in gpu_memory.module_of(self).parameters())
            with torch.inference_mode() if is_inference else contextlib.nullcontext():
                return super().detach(*args, **options)

    Resident.__name__ = Resident.__qualname__ = kind.__name__
    return Resident


def _make_writable(model: Any, *arguments: Any) -> None:
    """Give a twin's parameters new memory: those whose names are among ``arguments`` and that are not on a GPU. Their
    memory is the file, which is mapped read-only, and is shared with the original."""
    original = _originals[model]() if model in _originals else None
    for name in arguments:
        if original is not None and isinstance(name, str):
            weight = model.get_parameter(name)
            if weight.data_ptr() == original.get_parameter(name).data_ptr():
                weight.data = weight.data.clone()


def _take_patches_off(patcher: Any, extra_memory: float) -> int:
    """Prepare a loaded model for other LoRAs, keeping weights that no LoRA changes on the GPU; returns the bytes of the
    model on the GPU. ComfyUI itself would move the whole model off the GPU and back. Returns 0, and changes nothing, if
    the LoRAs are not about to change.
    """
    utils, model = sys.modules.get("comfy.utils"), patcher.model
    loaded: int = patcher.loaded_size()
    known = getattr(model, "current_weight_patches_uuid", None)
    fits = loaded > 0 and not model.model_lowvram and extra_memory + loaded > patcher.model_size()
    if utils is None or known in (None, patcher.patches_uuid) or not fits or patcher.hook_backup:
        return 0
    own = dict(patcher.backup)
    if any(saved.inplace_update for saved in own.values()):
        return 0
    modules = [model.get_submodule(key.rpartition(".")[0]) for key in {*own, *patcher.patches}]
    patcher.backup.clear()
    for key, saved in own.items():
        utils.set_attr_param(model, key, saved.weight)
    for module in modules:
        vars(module).pop("comfy_patched_weights", None)
    # Now it is in ComfyUI's state for a model loaded without LoRAs, except for the weights on the CPU.
    model.current_weight_patches_uuid, model.model_loaded_weight_memory = None, 0
    return loaded


def _after_load(patcher: Any, *_arguments: Any) -> None:
    _unload_other_copy(patcher.model)


def _unload_other_copy(model: Any) -> None:
    other = _other_copy(model)
    if other is not None:
        with best_effort("another copy of %s stays on the GPU", type(other).__name__):
            for loaded in _loaded(other):
                _unload(loaded)


def _other_copy(model: Any) -> Any:
    if model in _twins:
        return _twins[model].model
    return _originals[model]() if model in _originals else None


def _loaded(model: Any) -> Iterator[Any]:
    """ComfyUI's entries of a loaded model, except those for the current run."""
    for loaded in list(getattr(sys.modules.get("comfy.model_management"), "current_loaded_models", ())):
        if loaded.model is not None and loaded.model.model is model and not loaded.currently_used:
            yield loaded


def _unload(loaded: Any) -> None:
    management, patcher = sys.modules["comfy.model_management"], loaded.model
    if _is_dynamic(patcher):
        _unload_dynamic(patcher)
    else:
        others = [other for other in management.current_loaded_models if other is not loaded]
        management.free_memory(_EVERYTHING, loaded.device, others)


def _unload_dynamic(patcher: Any) -> None:
    # It is reloaded on demand, faster if more of it is still in pinned memory.
    patcher.partially_unload(patcher.offload_device, _EVERYTHING)


def _after_detach(patcher: Any, unpatch_all: bool = True) -> None:
    if unpatch_all:  # otherwise only another clone takes over
        _release(patcher)


def _release(patcher: Any) -> int:
    freed: int = oq.release(gpu_memory.module_of(patcher))
    if freed:
        _log.info("unloaded with the model: %.2f GB of 8-bit copies; its next run makes them again", freed / 1e9)
    return freed
