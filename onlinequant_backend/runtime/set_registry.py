"""The sets of weights of this process."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from .. import fork_locks
from ..quantization.weight_copy import Copy, copies_lock
from ..quantization.weight_set import WeightSet

if TYPE_CHECKING:
    pass


class SetRegistry:
    """Every set of weights in use in this process."""

    def __init__(self) -> None:
        self._sets: weakref.WeakSet[WeightSet] = weakref.WeakSet()
        self._lock = fork_locks.lock()  # models may run in threads of their own

    def __iter__(self) -> Iterator[WeightSet]:
        with self._lock:
            return iter(list(self._sets))

    def predecessor(self, parameters: Mapping[str, torch.Tensor]) -> WeightSet | None:
        """The known set of the model that ``parameters``, by qualified name, belong to, if some of them were
        replaced."""
        with self._lock:
            # Prefer one that can no longer be called: no other call needs its copies.
            known = max(self._sets, key=lambda each: (each.overlap(parameters), not each.alive), default=None)
        return known if known is not None and self.is_successor(parameters, known) else None

    @staticmethod
    def is_successor(parameters: Mapping[str, torch.Tensor], known: WeightSet) -> bool:
        """Whether ``parameters`` belong to the same model as the ``known`` set, with some weights replaced.

        A LoRA replaces weights and leaves biases and norms; another model may share a tensor or two.
        """
        return known.overlap(parameters) * 3 >= len(parameters)

    def add(self, weights: WeightSet) -> None:
        """Register a set for as long as it is referenced elsewhere."""
        with self._lock:
            self._sets.add(weights)

    def copied_bytes(self, weights: Sequence[torch.Tensor]) -> int:
        """The size in bytes of the 8-bit copies of models with any of ``weights``."""
        with self._lock:
            return sum(copy.nbytes() for copy in self._copies_beside(weights))

    def release(self, weights: Sequence[torch.Tensor]) -> int:
        """Free the 8-bit copies of models with any of ``weights``, and the CUDA graphs captured with them; returns the
        size of the copies in bytes."""
        with copies_lock:
            with self._lock:
                copies = self._copies_beside(weights)
                sets = [known for known in self._sets if any(layer.copy in copies for layer in known.layers)]
            prepared = [one for known in sets for one in known.prepared.values()]
            for known in sets:
                known.forget_calls()
            freed = sum(copy.release() for copy in copies)
        for one in prepared:
            one.release()
        return freed

    def _copies_beside(self, weights: Sequence[torch.Tensor]) -> set[Copy]:
        # Also by biases and norms: a LoRA's weights may be freed already, and the model's own never registered.
        ids = set(map(id, weights))
        running = [known for known in self._sets if known.selection is not None and known.has_any_of(ids)]
        return {layer.copy for known in running for layer in known.layers}

    def observe_again(self, weights: Sequence[torch.Tensor]) -> int:
        """Have the sets with any of ``weights`` observed anew at their next calls; returns their number. Must not be
        called while one of them is in a call."""
        wanted = set(map(id, weights))
        with self._lock:
            found = [known for known in self._sets if not known.has_freed() and known.has_any_of(wanted)]
        for known in found:
            known.start_over()
        return len(found)

    def clear(self) -> None:
        """Forget every set."""
        with self._lock:
            self._sets.clear()


known_sets = SetRegistry()
