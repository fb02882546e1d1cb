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
from torch.utils.weak import WeakIdRef

from . import compat


class StandIn:
    """Lives for as long as one tensor, whatever that is swapped with; call it for the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.refer_to(tensor)

    def __call__(self) -> torch.Tensor | None:
        """The tensor, or None once it is gone."""
        found: torch.Tensor | None = self._reference()
        return found

    def refer_to(self, tensor: torch.Tensor) -> None:
        """Have the only weak reference to ``tensor`` that this package makes."""
        self._reference: Callable[[], Any] = WeakIdRef(tensor, functools.partial(_forget, id(tensor)))

    def let_go(self) -> None:
        """Have none until ``refer_to``."""
        self._reference = lambda: None


_stand_ins: dict[int, StandIn] = {}


def stand_in(tensor: torch.Tensor) -> StandIn:
    """The one for ``tensor``: always the same."""
    compat.watch_swaps(_let_go, _refer_to)
    known = _stand_ins.get(id(tensor))
    if known is None:
        known = _stand_ins.setdefault(id(tensor), StandIn(tensor))  # another thread may have been first
    return known


def weakly(tensor: torch.Tensor) -> Callable[[], torch.Tensor | None]:
    """Like ``weakref.ref(tensor)``."""
    reference = weakref.ref(stand_in(tensor))

    def found() -> torch.Tensor | None:
        known = reference()
        return None if known is None else known()

    return found


def _forget(identity: int, _reference: object) -> None:
    _stand_ins.pop(identity, None)


def _let_go(tensor: torch.Tensor) -> None:
    known = _stand_ins.get(id(tensor))
    if known is not None:
        known.let_go()


def _refer_to(tensor: torch.Tensor) -> None:
    known = _stand_ins.get(id(tensor))
    if known is not None:
        known.refer_to(tensor)
