"""Weak references to users' tensors that do not get in the way of torch. torch refuses to swap tensors that have weak
references. ``module.to()`` swaps them under ``torch.__future__.set_swap_module_params_on_conversion(True)`` and always
with weights of a tensor subclass.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..torch_internals import weak_references


class WeakKey:
    """Lives as long as one tensor, also if that is swapped; calling it returns the tensor. It holds this package's only
    weak reference to the tensor.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        forget: Callable[[Any], object] = functools.partial(_forget, id(tensor))
        self._reference: Callable[[], Any] = weak_references.HarmlessReference(tensor, forget)

    def __call__(self) -> torch.Tensor | None:
        """The tensor, or None if it no longer exists."""
        found: torch.Tensor | None = self._reference()
        return found


_weak_keys: dict[int, WeakKey] = {}


def weak_key(tensor: torch.Tensor) -> WeakKey:
    """The key of ``tensor``: always the same object."""
    known = _weak_keys.get(id(tensor))
    if known is None:
        known = _weak_keys.setdefault(id(tensor), WeakKey(tensor))  # another thread may have been first
    return known


def weak_reference(tensor: torch.Tensor) -> Callable[[], torch.Tensor | None]:
    """Like ``weakref.ref(tensor)``."""
    reference = weakref.ref(weak_key(tensor))

    def found() -> torch.Tensor | None:
        known = reference()
        return None if known is None else known()

    return found


def _forget(identity: int, _reference: object) -> None:
    _weak_keys.pop(identity, None)
