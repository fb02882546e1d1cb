"""Replaces the offload hooks of a compiled model: 8-bit weights need no offloading, and layers whose weights are new
tensors in each call cannot be observed.

This happens when Dynamo compiles the first part of the model. If that is where the call of the model begins, the call
goes on without the hooks. Otherwise some have run already: the call runs uncompiled, and the hooks are replaced when
the next one begins.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..best_effort import warn_once
from ..config import QuantConfig
from ..errors import OffloadHooksError, OnlineQuantError
from ..kernels.precision import resolve
from ..quantization import host_weights
from ..quantization.host_weights import HostMemoryError
from ..torch_internals import dynamo_interface
from .casting_hooks import cast_in_graph
from .offload_hooks import OffloadHooks
from .placement import offload_hooks, replace

_log = logging.getLogger("onlinequant")
_lack_memory = WeakIdKeyDictionary()


def follow(backend: Callable[..., Any]) -> None:
    """From now on, replace the offload hooks of the models that Dynamo compiles for ``backend``."""

    def compile_frame(compilation: dynamo_interface.Compilation, trace: Callable[[], Any]) -> Any:
        if dynamo_interface.innermost_backend(compilation.backend) is not backend:
            return trace()
        _cast_in_graph(compilation)
        root = _offloaded_root(compilation)
        return trace() if root is None else _without_hooks(root, compilation, trace)

    dynamo_interface.around_compilations(compile_frame, shown=OnlineQuantError)


def _cast_in_graph(compilation: dynamo_interface.Compilation) -> None:
    """See ``casting_hooks``: before anything is traced, since these hooks break the graph at every layer."""
    root = compilation.root
    weight = None if root is None else next(root.parameters(), None)
    if root is not None and weight is not None and _config_of_8_bit(root, weight.device, compilation.backend):
        cast_in_graph(root)


def _offloaded_root(compilation: dynamo_interface.Compilation) -> nn.Module | None:
    """The model that is compiled, if its offload hooks can be replaced."""
    root = compilation.root
    hooks = None if root is None else _replaceable(root)
    return root if root is not None and hooks and _may_be_in_8_bit(root, hooks, compilation.backend) else None


def _without_hooks(root: nn.Module, compilation: dynamo_interface.Compilation, trace: Callable[[], Any]) -> Any:
    called = dynamo_interface.called_module(root)
    if isinstance(vars(called).get("forward"), _Once):  # the model is called in a way that does not reach that
        return trace()
    if _is_beginning(compilation, root, called):
        _replace(root)
        return trace()
    called.forward = _Once(called, functools.partial(_replace, root))
    return dynamo_interface.uncompiled_once()


def _is_beginning(compilation: dynamo_interface.Compilation, root: nn.Module, called: nn.Module) -> bool:
    """Whether the frame begins the call of the model, before any hook has run. It uses those that are there by then."""
    if called is not root and isinstance(vars(called).get("forward"), functools.partial):  # the wrapper has the hook
        return False
    if compilation.code is nn.Module._call_impl.__code__:
        return compilation.scope["L"].get("self") is root
    forward = vars(root).get("forward")
    is_forward = isinstance(forward, functools.partial) and compilation.code is getattr(forward.func, "__code__", None)
    return is_forward and compilation.scope["L"].get("module") is root


def _may_be_in_8_bit(root: nn.Module, hooks: OffloadHooks, backend: Any) -> bool:
    config = _config_of_8_bit(root, hooks.device, backend)
    return config is not None and config.float_weights != "device"


def _config_of_8_bit(root: nn.Module, device: torch.device, backend: Any) -> QuantConfig | None:
    """The options, if layers of the model may run in 8 bit on this device."""
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in root.parameters()):
        return None
    arguments = dynamo_interface.backend_arguments(backend)
    try:
        config = QuantConfig.from_options(arguments.get("options"), arguments.get("mode"))
        return config if resolve(config.precision, device).name != "float" else None
    except OnlineQuantError:
        return None  # the backend will raise it


def _replaceable(root: nn.Module) -> OffloadHooks | None:
    """The hooks of a model that can be replaced."""
    if root in _lack_memory:
        return None
    name = type(root).__name__
    try:
        hooks = offload_hooks(root)
    except OffloadHooksError as error:
        warn_once(f"{name} {error}", "the offload hooks of %s stay, so that it may stay in float: %s", name, error)
        return None
    return hooks if hooks is not None and hooks.offload and host_weights.supports(hooks.device) else None


def _replace(root: nn.Module) -> None:
    hooks = _replaceable(root)
    if hooks is None:
        return
    name = type(root).__name__
    try:
        replace(root, hooks, hooks.device)
    except HostMemoryError as error:
        _lack_memory[root] = True
        _log.warning("the offload hooks of %s stay, so that it stays in float: %s", name, error)
        return
    _log.warning(
        "the offload hooks of %s are replaced: its float weights stay in host memory, where %s reads them, and its "
        "8-bit weights will stay on that device",
        name,
        hooks.device,
    )


class _Once:
    """Takes the place of a module's ``forward`` method for one call, and does something before it."""

    def __init__(self, module: nn.Module, act: Callable[[], None]) -> None:
        functools.update_wrapper(self, module.forward)
        self._module = module
        self._act = act
        self._forward = module.forward
        self._own = vars(module).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._end():  # hooks that were added later are running
            return self._forward(*args, **kwargs)
        return self._module.forward(*args, **kwargs)

    @torch.compiler.disable
    def _end(self) -> bool:
        if vars(self._module).get("forward") is not self:
            return False
        if self._own is None:
            del self._module.forward
        else:
            self._module.forward = self._own
        self._act()
        return True
