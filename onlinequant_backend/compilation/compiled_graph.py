"""A compiled 8-bit graph and the inputs of its calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..kernels.clip_counting import Seen
from ..quantization.weight_copy import copies_lock
from ..quantization.weight_set import WeightSet
from ..tensors import getter
from .counting_call import CountingCall
from .cuda_graphs import GraphedCall
from .symbolic_inputs import SymbolicInputs


class Prepared(NamedTuple):
    """A compiled function for one set of weights, its counting variant, and the inputs that rewriting added, as of the
    set's ``generation``."""

    function: Callable[..., Any]
    counting: CountingCall
    extras: tuple[torch.Tensor, ...]
    generation: int

    def release(self) -> None:
        """Free the memory of CUDA graphs."""
        for call in (self.function, self.counting.run):
            if isinstance(call, GraphedCall):
                call.release()


class CompiledGraph:
    """One 8-bit graph compiled by Inductor, with its selection of a call's arguments and its extra inputs. ``moved``:
    positions among its inputs of CPU tensors that are passed on the GPU. ``graphed``: turns the compiled function into
    one that is replayed as a CUDA graph; None for no CUDA graph.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        taken: Sequence[int],
        extra_inputs: Sequence[tuple[str, int | tuple[int, ...]]],
        symbolic: SymbolicInputs | None = None,
        moved: Sequence[int] = (),
        graphed: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        self.function = function
        self._moved = moved
        self._graphed = graphed
        self._take = getter(taken)
        self._extra_inputs = extra_inputs
        self._symbolic = symbolic

    def __call__(self, args: Sequence[Any], weights: WeightSet) -> Any:
        prepared = self.prepare(weights)
        return prepared.function(*self._taken(args, weights), *prepared.extras)

    def once(self, args: Sequence[Any], weights: WeightSet) -> Any:
        """A call for which no CUDA graph is captured, which would keep its memory."""
        return self.function(*self._taken(args, weights), *self.prepare(weights).extras)

    def count(self, args: Sequence[Any], weights: WeightSet) -> tuple[Any, dict[int, Seen]]:
        """A call that also returns the counts of its layers' inputs, see ``CountingCall``."""
        prepared = self.prepare(weights)
        return prepared.counting(*self._taken(args, weights), *prepared.extras)

    def _taken(self, args: Sequence[Any], weights: WeightSet) -> tuple[Any, ...]:
        taken: tuple[Any, ...] = self._take(args)
        if self._moved:
            device = weights.layers[0].device
            taken = tuple(arg.to(device) if i in self._moved else arg for i, arg in enumerate(taken))
        return taken

    def prepare(self, weights: WeightSet) -> Prepared:
        """The state for calls with ``weights``; raises RuntimeError if its extra inputs cannot be made."""
        known: Any = weights.prepared.get(self)
        if known is None or known.generation != weights.generation:
            with copies_lock:  # otherwise copies released meanwhile would stay
                known = weights.prepared[self] = self._prepared(weights, known)
        return known

    def _prepared(self, weights: WeightSet, known: Prepared | None) -> Prepared:
        extras = tuple(weights.extra(what, of) for what, of in self._extra_inputs)
        if known is not None and all(map(operator.is_, extras, known.extras)):
            return known._replace(generation=weights.generation)
        # A CUDA graph is bound to addresses, so every set of weights has its own.
        function = self.function if self._graphed is None else self._graphed(self.function)
        return Prepared(function, CountingCall(self.function, self._graphed), extras, weights.generation)

    @property
    def is_symbolic(self) -> bool:
        """Whether it has symbolic sizes."""
        return self._symbolic is not None

    def fits(self, args: Sequence[Any], at_least: int = 0) -> bool:
        """Whether it is valid for the sizes of ``args``; see ``SymbolicInputs.fits``."""
        return self._symbolic is None or self._symbolic.fits(args, at_least)
