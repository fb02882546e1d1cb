"""What may be referred to weakly in the place of a tensor of the user's.

torch swaps no tensors that weak references exist of, as ``module.to()`` does under
``torch.__future__.set_swap_module_params_on_conversion(True)`` and always with weights of a tensor subclass.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..torch_internals import weak_references


class WeakKey:
    """Lives for as long as one tensor, whatever that is swapped with; call it for the tensor.

    It has the only weak reference to the tensor that this package makes.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        forget: Callable[[Any], object] = functools.partial(_forget, id(tensor))
        self._reference: Callable[[], Any] = weak_references.HarmlessReference(tensor, forget)

    def __call__(self) -> torch.Tensor | None:
        """The tensor, or None once it is gone."""
        found: torch.Tensor | None = self._reference()
        return found


_weak_keys: dict[int, WeakKey] = {}


def weak_key(tensor: torch.Tensor) -> WeakKey:
    """The one for ``tensor``: always the same."""
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
