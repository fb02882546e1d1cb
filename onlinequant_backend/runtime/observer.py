"""Observed calls: computes the float result and records the layers' inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from ..best_effort import best_effort
from ..compilation.graph_memory import give_back_freed_memory
from ..progress import Progress
from ..quantization.observation import Observation
from ..quantization.weight_streaming import streaming
from ..selection import layer_timing
from ..selection.sensitivity import measure_end_to_end
from ..torch_internals.allocator import compact_memory
from .graph_compiler import GraphCompiler, turn
from .sample import Sample
from .weight_state import WeightState, WeightStates


class Observer:
    """Observes the calls of one graph."""

    def __init__(self, states: WeightStates, compiler: GraphCompiler) -> None:
        self._traced = states.traced
        self._candidates = states.candidates
        self._compiler = compiler
        self._progress: Progress | None = None

    def observe(self, args: Sequence[Any], state: WeightState, is_last: bool) -> Any:
        """The float result of a call. ``is_last``: the errors of all layers are measured as well."""
        traced = self._traced
        parameters = traced.inputs.take_parameters(args)
        candidates = [index for index, info in enumerate(traced.infos) if info.quantized]
        state.check_not_freed(parameters)
        if is_last or traced.streams_while_observing:
            with self._compiler.moving(parameters):
                state.move_to_host(parameters, candidates)
        # All errors are measured now. Where float weights are on the host, beside the activations of a float step there
        # may be no memory for all copies, so each is made again when its layer is selected.
        kept = candidates if is_last and not traced.keeps_weights_on_host else []
        if is_last and traced.provider.captures_graphs:  # it calls the kernels of every layer
            layer_timing.compile_ahead(traced.module, traced.precision.format, traced.device)
            give_back_freed_memory(traced.device)  # before the long-lived copies are allocated in it
        alone = turn(traced) if self._compiler.background is not None else contextlib.nullcontext()
        floats = [parameters[position] for position in self._candidates]
        with alone, compact_memory(traced.device) as trim, torch.no_grad(), state.room(parameters, kept), streaming():
            observation = Observation(
                *(state.layers, floats, is_last, frozenset(kept)),
                attention=traced.attention,
                attention_format=traced.precision.name,
                trim=trim,
            )
            return traced.observed(*args, observation)

    def end(self, args: Sequence[Any], state: WeightState, result: Any) -> None:
        """End observing; ``args`` and ``result`` are those of the last observed call."""
        traced = self._traced
        parameters = traced.inputs.take_parameters(args)
        if traced.config.max_error is None and traced.may_repeat and not traced.is_random:  # else nothing is compared
            with best_effort("a step in float has to be made to measure the error"):  # memory may run out
                state.sample = Sample.of(traced.inputs, args, result, state.fingerprint(parameters, again=False))
        if traced.config.sensitivity == "end_to_end":
            measure_end_to_end(traced.observed, args, state.layers, traced.infos, result)
        state.calibrated_rest = state.rest_fingerprint(parameters)
        state.freeze()

    def show_progress(self, step: int, steps: int) -> None:
        """Report that this step is being observed, counted from 1."""
        if self._progress is None or step == 1:  # a run may have been interrupted
            self._progress = Progress("observing", steps)
        self._progress.advance(to=step)
        if step >= steps:
            self._progress.close()
            self._progress = None
