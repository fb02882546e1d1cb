"""Weak references to tensors."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdRef


class HarmlessReference(WeakIdRef):
    """A weak reference to a tensor that does not keep torch from swapping it: afterwards it refers to the same object
    with other content."""

    def __init__(self, tensor: torch.Tensor, callback: Callable[[Any], object]) -> None:
        super().__init__(tensor, callback)
        # The function looks this name up at every call; the function itself may have been imported by other modules
        # already.
        vars(torch.utils)["weakref"] = _weakref_without_harmless


_weakref_without_harmless = types.ModuleType("weakref")
_weakref_without_harmless.__dict__.update(vars(weakref))


def _getweakrefs(value: Any) -> list[Any]:
    return [reference for reference in weakref.getweakrefs(value) if not isinstance(reference, HarmlessReference)]


_weakref_without_harmless.getweakrefs = _getweakrefs  # type: ignore[attr-defined]
