"""Calls of a set of weights that is not quantized yet: observes or restores it, then has layers selected."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..report.phases import Phase
from ..report.report import VISIBLE
from .compiled_graphs import NO_VALUES
from .failures import CallersError, Failures
from .finisher import Finisher
from .graph_compiler import GraphCompiler
from .observer import Observer
from .sampling import current_run
from .selector import Selector
from .weight_state import WeightState, WeightStates

_log = logging.getLogger("onlinequant")

_MOST_REPLACED = 8
_REPLACED = (
    "its weights are new tensors in each call, as with sequential offload, so that they cannot be observed for "
    "several calls; move the model as a whole instead, as enable_model_cpu_offload() does"
)


class Calibration:
    """Calibrates the sets of weights of one graph, call by call."""

    def __init__(
        self,
        states: WeightStates,
        failures: Failures,
        compiler: GraphCompiler,
        observer: Observer,
        selector: Selector,
        finisher: Finisher,
    ) -> None:
        self._states = states
        self._traced = states.traced
        self._report = states.traced.report
        self._failures = failures
        self._compiler = compiler
        self._observer = observer
        self._selector = selector
        self._finisher = finisher

    def run(self, args: Sequence[Any], parameters: Sequence[torch.Tensor], state: WeightState) -> Any:
        """The float result of a call, which is observed if needed. If nothing is left to observe, selects layers
        instead: then ``state.selection`` is set and the result is None."""
        if self._states.replaced >= _MOST_REPLACED and not self._failures.gave_up:
            self._failures.leave_in_float(_REPLACED)
        if self._compiler.graphs.is_empty(args):
            self._report.enter(Phase.FLOAT, NO_VALUES.reason)
            return self._run_float(args)
        if not self._report.is_in(Phase.OBSERVING):  # keep another reason for that phase
            self._report.enter(Phase.OBSERVING, "observing in float")
        with contextlib.ExitStack() as locks:
            for lock in (self._states.lock, state.layers[0].lock):
                # Another graph of this model may be waiting to be compiled in the background, which takes long.
                if not lock.acquire(blocking=not self._finisher.may_use_background()):
                    return self._run_float(args)
                locks.callback(lock.release)
            if state.selection is not None:
                return None
            if not state.is_calibrated() and state.entry is None:
                self._restore(parameters, state)
            if not state.is_calibrated():
                return self._observe(args, parameters, state)
            # It is fast for another set of weights, which needs no compile, and for a graph in the cache.
            if self._finisher.may_use_background() and not (
                self._compiler.graphs.known or self._compiler.is_cached(state, parameters)
            ):
                self._finisher.finish_in_background(args)
                return self._run_float(args)
            self._selector.select(args, parameters, state)
            return self.run(args, parameters, state) if state.selection is None else None

    def _run_float(self, args: Sequence[Any]) -> Any:
        return self._finisher.run_float(args)

    def _restore(self, parameters: Sequence[torch.Tensor], state: WeightState) -> None:
        """Load what another process observed of these weights, if it is in the cache."""
        entry = self._states.entry(state, parameters)
        restored = entry.restore(state.layers)
        self._report.cache_hit = self._report.cache_hit or restored
        if not restored:
            return
        state.calibrated_rest = state.rest_fingerprint(parameters)
        entry.load_attention(self._traced.attention)
        error = entry.load_error()
        # That process compared its first step with float. This one need not, unless the error must be reported.
        state.is_compared = error is not None and error < VISIBLE
        if self._report.error is None:
            self._report.error = error

    def _observe(self, args: Sequence[Any], parameters: Sequence[torch.Tensor], state: WeightState) -> Any:
        run = current_run()
        if run is not None and run.is_observed:
            self._report.calibration_steps = run.steps
            self._observer.show_progress(run.step, run.steps)
            finish = (
                self._finisher.finish_in_background if self._finisher.may_use_background() else self._finisher.finish
            )
            run.at_end((self, state), functools.partial(finish, args))
            is_last = False
        else:
            step, steps = state.calls() + 1, self._traced.config.calibration_steps
            is_last = step >= steps
            self._observer.show_progress(step, steps)
        try:
            with state.observed_or_not():
                result = self._observer.observe(args, state, is_last)
        except Exception as error:
            return self._run_unobserved(args, error)
        state.numbers.widen(self._compiler.graphs.numbers(args))
        state.count_call(state.fingerprint(parameters, again=is_last), self._traced.operations)
        if not state.was_called_once():
            self._states.replaced = 0
        self._report.calls_observed = state.calls()
        if is_last:
            self._observer.end(args, state, result)
        return result

    def _run_unobserved(self, args: Sequence[Any], error: Exception) -> Any:
        """The float result of a call that failed while it was observed; the next one is observed again. An error that
        float raises as well belongs to the caller and is no reason to give up."""
        result = None
        if self._traced.may_repeat:
            try:
                result = self._run_float(args)
            except Exception as caller_error:
                raise CallersError(caller_error) from None
        if self._failures.tolerates_another():
            _log.warning("a call could not be observed, so the next one is: %s: %s", type(error).__name__, error)
        else:
            self._failures.give_up(error)
        if not self._traced.may_repeat:  # the failed call may have had side effects already
            raise CallersError(error)
        return result
