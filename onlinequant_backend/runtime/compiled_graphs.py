"""The compiled graphs of one Dynamo graph, and how calls find theirs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..analysis.traced_graph import TracedGraph
from ..compilation import symbolic_inputs
from ..compilation.compiled_graph import CompiledGraph
from ..compilation.inductor_job import NotNowError
from ..graph import dynamic_shapes
from ..tensors import relative_error
from .weight_state import WeightState

_log = logging.getLogger("onlinequant")

# Between the relative error of a correct 8-bit graph, about 0.05, and that of a wrong one, about 1.
_SAME_GRAPH_ERROR = 0.3

# The most kinds of calls, such as values of a float, to compile a graph for: Dynamo's own limit for a frame.
_MOST_KINDS = 8

Key = tuple[tuple[Any, ...], tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class InFloat:
    """Takes the place of a compiled graph for calls that run in float, with the ``reason``."""

    reason: str


NO_VALUES = InFloat("a tensor without values was passed: there is nothing to compute")


class CompiledGraphs:
    """Compiles a graph for each new kind of call, first for the sizes of that call, then once more for all sizes.
    ``build(args, weights, symbolic)`` makes one. It returns ``InFloat`` for failures that it has reported, and raises
    if a ``symbolic`` build, which is for all sizes, fails.

    Attributes:
        known: the existing graphs by ``key``.
    """

    def __init__(
        self, traced: TracedGraph, build: Callable[[Sequence[Any], WeightState, bool], CompiledGraph | InFloat]
    ) -> None:
        self._traced = traced
        self._graph = traced.module
        self._which_shapes = traced.config.shapes
        self._build = build
        self._inputs = traced.inputs
        self._may_be_symbolic = self._which_shapes != "static" and dynamic_shapes.has_symbols(self._graph)
        self.known: dict[Key, CompiledGraph | InFloat] = {}
        # The graphs for all sizes, by fixed part of the key, then by the expanded sizes of 1.
        self._general: dict[tuple[Any, ...], dict[frozenset[Any], CompiledGraph]] = {}
        self._too_many: InFloat | None = None

    def are_all_in_float(self) -> bool:
        """Whether there are graphs, and none of them is in 8 bit."""
        found = [graph for graph in list(self.known.values()) if graph is not NO_VALUES]
        return bool(found) and not any(isinstance(graph, CompiledGraph) for graph in found)

    def numbers(self, args: Sequence[Any]) -> tuple[float, ...]:
        """The numbers among a call's inputs, such as a LoRA's strength."""
        return tuple([float(args[position]) for position in self._inputs.numbers])

    def key(self, args: Sequence[Any], weights: WeightState) -> Key:
        """The properties that a compiled graph is specialised for: float values, dtypes and similar, and sizes."""
        fixed: list[Any] = [weights.kind]
        sizes: list[Any] = []
        for position in self._inputs.others:
            value = args[position]
            if not isinstance(value, torch.Tensor):
                (sizes if isinstance(value, int) else fixed).append(value)
            elif position in self._inputs.wrapped_floats:
                if position not in self._inputs.open_floats:
                    fixed.append(float(value))
            else:
                fixed.append(value.dtype)
                sizes.append((value.shape, value.stride()))
        return tuple(fixed), tuple(sizes)

    def needs_build(self, key: Key, args: Sequence[Any], weights: WeightState) -> bool:
        """Whether ``make`` would compile for a call whose key is not known yet."""
        fixed, _ = key
        if self.is_empty(args):
            return False
        return not self._are_too_many(fixed) and self._find_general(fixed, args, weights) is None

    def make(self, key: Key, args: Sequence[Any], weights: WeightState) -> CompiledGraph | InFloat:
        """The graph for a call whose key is not known yet; adds it to ``known`` unless there are too many kinds."""
        fixed, _ = key
        if self.is_empty(args):
            self.known[key] = NO_VALUES
            return NO_VALUES
        if self._are_too_many(fixed):
            self._too_many = self._too_many or self._say_too_many()
            return self._too_many
        symbolic = self._is_symbolic(weights)
        general = self._general.setdefault(fixed, {}) if symbolic else {}
        compiled: CompiledGraph | InFloat | None = self._find_general(fixed, args, weights)
        if compiled is None:
            expanded = dynamic_shapes.broadcast_sizes(self._graph, args) if symbolic else frozenset()
            compiled = self._built(args, weights, symbolic and expanded not in general)
            if isinstance(compiled, CompiledGraph) and compiled.is_symbolic:
                general[expanded] = compiled
                if not self._serves(compiled, args, weights):
                    compiled = self._built(args, weights, symbolic=False)
        self.known[key] = compiled
        return compiled

    def _say_too_many(self) -> InFloat:
        """Warn once that calls of new kinds run in float; those with a compiled graph are not affected."""
        fixed = self._inputs.wrapped_floats - self._inputs.open_floats
        numbers = [self._inputs.names[i].strip("_").removeprefix("l_") for i in fixed]
        reason = f"it was compiled for {_MOST_KINDS} kinds of calls and runs in float for all others"
        if numbers:
            reason += f"; pass a tensor instead of a number that changes with every call ({', '.join(sorted(numbers))})"
        _log.warning("%s: %s", self._traced.report.model, reason)
        return InFloat(reason)

    def forget_failed(self) -> None:
        """Forget the builds that failed, so that the next calls try again."""
        for key in [key for key, compiled in self.known.items() if isinstance(compiled, InFloat)]:
            del self.known[key]

    def is_empty(self, args: Sequence[Any]) -> bool:
        """Whether an input of a call is a tensor without elements: it cannot be observed, and its sizes decide
        nothing."""
        values = (args[position] for position in self._inputs.others)
        return any(isinstance(value, torch.Tensor) and not value.numel() for value in values)

    def _are_too_many(self, fixed: tuple[Any, ...]) -> bool:
        kinds = {fixed for fixed, _ in self.known}
        return fixed not in kinds and len(kinds) >= _MOST_KINDS

    def _is_symbolic(self, weights: WeightState) -> bool:
        is_first = dynamic_shapes.is_first(weights.layers[0]) and self._which_shapes == "auto"
        return self._may_be_symbolic and not is_first

    def _find_general(self, fixed: tuple[Any, ...], args: Sequence[Any], weights: WeightState) -> CompiledGraph | None:
        general = self._general.get(fixed, {}) if self._is_symbolic(weights) else {}
        return next((known for known in general.values() if self._serves(known, args, weights)), None)

    def _built(self, args: Sequence[Any], weights: WeightState, symbolic: bool) -> CompiledGraph | InFloat:
        if symbolic:
            try:
                return self._build(args, weights, True)
            except NotNowError:
                raise
            except Exception as error:
                _log.warning("compile for all sizes failed; one per size: %s: %s", type(error).__name__, error)
                self._may_be_symbolic = False
        return self._build(args, weights, False)

    def _serves(self, compiled: CompiledGraph, args: Sequence[Any], weights: WeightState) -> bool:
        """Whether a compiled graph is valid for these sizes. One for all sizes assumes that none is 1. Sizes only
        affect which elements it reads and writes, so one comparison with the float graph shows whether that assumption
        matters.
        """
        if compiled.fits(args):
            return True
        may_repeat = not weights.has_freed() and self._traced.may_repeat
        if not may_repeat or not compiled.fits(args, at_least=symbolic_inputs.SMALLEST):
            return False
        try:
            with torch.no_grad():
                return relative_error(compiled(args, weights), self._graph(*args)) < _SAME_GRAPH_ERROR
        except Exception as error:  # Inductor's own checks of the sizes
            _log.debug("the graph for all sizes does not support these: %s", error)
            return False
