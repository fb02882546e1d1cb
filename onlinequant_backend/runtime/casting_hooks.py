"""The layerwise casting of diffusers: ``enable_layerwise_casting``, ``apply_layerwise_casting``.

Before each call of a layer its hook casts the layer's parameters, in place, to the dtype that it computes in, and after
it back to the one in which they are kept, such as float8. Dynamo cannot trace that. A layer that casts its parameters
as a part of its computation does the same with the same results, and its weight stays what it is.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..best_effort import warn_once

_log = logging.getLogger("onlinequant")

_SOURCE = "diffusers.hooks.hooks"
_CASTING = "layerwise_casting"
# Those that read each parameter as an attribute of ``self`` and call no method of a base class.
_FORWARDS = {
    kind.forward
    for kind in (
        nn.Linear,
        nn.Embedding,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
}


def cast_in_graph(root: nn.Module) -> int:
    """Have the layers of a model cast their parameters within ``forward``, instead of by hooks before and after it;
    returns how many do so only now. The hooks stay registered: diffusers looks there for the model's dtype. A layer
    that is running, whose parameters are cast at the moment, keeps its hook until the next time.
    """
    changed = 0
    kept = set()
    for module, hook in _hooks(root):
        if isinstance(hook.fn_ref.forward, functools.partial) and hook.fn_ref.forward.func is _forward:
            continue
        if not _can_cast(module, hook):
            kept.add(type(module).__name__)
        elif _is_at_rest(module, hook.storage_dtype):
            _replace(module, hook)
            changed += 1
    name = type(root).__name__
    if kept:
        kinds = ", ".join(sorted(kept))
        warn_once(
            f"casting {name} {kinds}",
            "layerwise casting of %s breaks its graph, so that it may stay in float: of %s it cannot be traced",
            name,
            kinds,
        )
    if changed:
        _log.info("layerwise casting is a part of the graph of %s: %d layers", name, changed)
    return changed


def _hooks(root: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    if _SOURCE not in sys.modules:  # then no model can have them
        return
    for module in root.modules():
        registry = vars(module).get("_diffusers_hook")
        hook = None if registry is None else registry.hooks.get(_CASTING)
        if hook is not None:
            yield module, hook


def _can_cast(module: nn.Module, hook: Any) -> bool:
    """Whether nothing but the hook and the class decides what the layer does."""
    forward = type(module).forward
    return forward in _FORWARDS and hook.fn_ref.forward == types.MethodType(forward, module)


def _is_at_rest(module: nn.Module, storage: torch.dtype) -> bool:
    return all(weight.dtype == storage for weight in module.parameters() if weight.is_floating_point())


def _replace(module: nn.Module, hook: Any) -> None:
    nothing = sys.modules[_SOURCE].ModelHook()
    hook.fn_ref.pre_forward, hook.fn_ref.post_forward = nothing.pre_forward, nothing.post_forward
    hook.fn_ref.forward = functools.partial(_forward, module, hook.compute_dtype)


def _forward(module: nn.Module, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(_Cast(module, dtype), *args, **kwargs)


class _Cast:
    """A layer as its ``forward`` method sees it, with its parameters in another dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value
