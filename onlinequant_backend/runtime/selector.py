"""Quantizing the selected layers of a set of weights, and quantizing changed weights again."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..report.phases import Phase
from ..selection.layer_choice import LayerChoice
from .graph_compiler import GraphCompiler, standing
from .weight_state import WeightState, WeightStates

_log = logging.getLogger("onlinequant")


class Selector:
    """The selected layers of one graph; the first set of weights to be selected decides which these are."""

    def __init__(self, states: WeightStates, compiler: GraphCompiler) -> None:
        self._states = states
        self._traced = states.traced
        self._compiler = compiler
        self._choice = LayerChoice(states.traced)

    def select(self, args: Sequence[Any], parameters: Sequence[torch.Tensor], state: WeightState) -> None:
        """Quantize the selected layers' weights. If another checkpoint was loaded since the last observed call,
        quantizes none and has the set observed anew."""
        infos, traced = self._traced.infos, self._traced
        rest = state.rest_fingerprint(parameters)
        if state.calibrated_rest not in (None, rest):
            self._start_over(state)
            return
        state.calibrated_rest = rest
        candidates = [i for i, info in enumerate(infos) if info.quantized]
        with self._compiler.moving(parameters):
            state.move_to_host(parameters, candidates)
        state.quantize(parameters, candidates, self._states.saved_weights(state, parameters))
        refusals = [layer.refusal() for layer in state.layers]
        if not self._choice.is_made:
            self._choice.make(args, state, refusals, self._states.entry(state, parameters).load_autotuning)
            state.is_compared = state.is_compared or traced.config.max_error is not None  # already measured
        chosen = tuple(i for i, info in enumerate(infos) if info.quantized and not refusals[i])
        state.kind = self._states.kind(state, chosen)
        with self._compiler.moving(parameters):
            state.select(parameters, chosen)
        # A LoRA may have been loaded since the last observed call. ``is_current`` notices later changes.
        if not state.is_calibrated_for(state.fingerprint(parameters), traced.operations):
            state.schedule.restart()
        if self._compiler.graphs.known and state.entry is not None:  # no compile follows that would publish it
            self._compiler.publish_result(standing(state), parameters, state, is_compiled=False)

    def follow(self, parameters: Sequence[torch.Tensor], state: WeightState) -> None:
        """Quantize changed weights again, in place. If all other parameters have changed as well, calibrate anew."""
        with self._states.lock:
            if state.selection is None:
                return
            start = time.perf_counter()
            try:
                state.follow(parameters)
                self._check_change(parameters, state)
            except BaseException:  # for example an interrupt: the next call does the rest
                state.generation = -1
                raise
            seconds = time.perf_counter() - start
            if state.changed:
                _log.info("quantized %d changed weights again in %.2f s", len(state.changed), seconds)
            state.changed.clear()

    def _check_change(self, parameters: Sequence[torch.Tensor], state: WeightState) -> None:
        """Schedule drift checks after a change of weights; have another checkpoint observed anew."""
        if state.changed:
            state.schedule.restart()
        assert state.selection is not None
        if not state.is_calibrated():  # another graph of this model has already reset the set
            state.selection = None
            return
        have_all_changed = state.changed >= {state.layers[index].copy for index in state.selection}
        # A LoRA leaves biases and norms as they are; moving the model changes no value.
        if state.selection and have_all_changed and state.rest_fingerprint(parameters) != state.calibrated_rest:
            self._start_over(state)

    def _start_over(self, state: WeightState) -> None:
        """Observe a set anew, since it now holds another checkpoint."""
        _log.info("another checkpoint was loaded, so the model is calibrated again")
        state.start_over()
        state.calibrated_rest = None
        state.release_entry()
        self._choice.is_made = False
        self._traced.report.enter(Phase.OBSERVING, "another checkpoint was loaded")
