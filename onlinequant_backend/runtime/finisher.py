"""All steps from observing to a compiled 8-bit graph at once: at the end of an observed run, or in the background."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..best_effort import best_effort
from ..errors import OnlineQuantError
from ..quantization import host_weights
from ..quantization.weight_copy import Call
from ..report.phases import Phase
from ..report.report import Report
from .announcement import announce
from .background import Background
from .failures import Failures
from .graph_compiler import BackgroundWork, GraphCompiler, places, turn
from .observer import Observer
from .selector import Selector
from .weight_state import WeightState, WeightStates

_log = logging.getLogger("onlinequant")


class Finisher:
    """Finishes one graph: observes once more if necessary, selects layers, and compiles."""

    def __init__(
        self,
        states: WeightStates,
        failures: Failures,
        compiler: GraphCompiler,
        observer: Observer,
        selector: Selector,
    ) -> None:
        self._states = states
        self._traced = states.traced
        self._report = states.traced.report
        self._failures = failures
        self._compiler = compiler
        self._observer = observer
        self._selector = selector
        self._background = Background(functools.partial(_report_fork, self._report))

    def is_busy(self) -> bool:
        """Whether work on this graph runs in the background."""
        return self._background.is_busy()

    def run_float(self, args: Sequence[Any]) -> Any:
        """The float result of a call."""
        parameters = self._traced.inputs.take_parameters(args)
        for state in self._states:
            state.check_not_freed(parameters)
            if self._failures.gave_up:
                state.sample = None  # it will not be compared
        if host_weights.are_any_on_host() and (self._failures.gave_up or self._compiler.graphs.are_all_in_float()):
            with best_effort("the float weights stay in host memory, so that each step copies them"):
                for state in self._states:
                    state.read_in_float()
                host_weights.move_to_device(parameters)
        with turn(self._traced) if self.is_busy() else contextlib.nullcontext():
            return self._traced.in_float(args)

    def may_use_background(self) -> bool:
        """Whether another thread may compile for a call like this one."""
        config = self._traced.config
        if not config.compile_in_background or config.free_float_weights or not self._traced.may_repeat:
            return False
        # This state is per thread and part of the compiled graph.
        return not torch.is_autocast_enabled(self._traced.device.type)

    def finish_in_background(self, args: Sequence[Any]) -> None:
        """``finish`` in another thread; calls run in float until then."""
        if self._failures.gave_up:
            return
        kept = self._traced.inputs.kept(args)
        before = self._report.copy()
        work = BackgroundWork()

        def run() -> None:
            work.places = places(self._traced.inputs.take_parameters(kept))
            self._report.enter(Phase.COMPILING, "in the background, calls run in float")
            self.finish(kept, work)

        def conclude() -> None:
            if self._failures.gave_up:
                return
            if work.result is None:
                self._report.enter_as(before)
                announce(self._report, in_log=False)
            else:
                result, in_log = work.result
                self._report.enter(*result)
                announce(self._report, in_log)

        self._background.start(run, conclude, self._traced.device)

    def finish(self, args: Sequence[Any], background: BackgroundWork | None = None) -> None:
        """Observe, select and compile. With ``background``, no OnlineQuantError is raised, and the model may be
        moved."""
        parameters = self._traced.inputs.take_parameters(args)
        try:
            with self._states.lock, self._traced.state.autocasting(), Call() as call:
                self._compiler.background = background
                state = self._states.of(parameters)
                call.layers = state.layers
                if self._failures.gave_up:
                    return
                if state.selection is None:
                    self._end_run(args, parameters, state)
                if state.selection is not None:
                    self._compiler.get(self._compiler.graphs.key(args, state), args, state)
        except Exception as error:
            if self._compiler.was_moved(parameters):
                self._compiler.note_move()
                _log.warning("the model was moved while it was compiled, so it is compiled again: %s", error)
                return
            if isinstance(error, OnlineQuantError) and background is None:
                raise
            self._failures.give_up(error)
        finally:
            self._compiler.background = None

    def _end_run(self, args: Sequence[Any], parameters: Sequence[torch.Tensor], state: WeightState) -> None:
        with state.layers[0].lock:
            if not state.is_calibrated():
                # It is not known beforehand which call is the last: so sensitivities are measured after it.
                result = self._observer.observe(args, state, is_last=True)
                self._observer.end(args, state, result)
            self._selector.select(args, parameters, state)


def _report_fork(report: Report) -> None:
    reason = "this process was forked from one that was compiling in the background; start it by 'spawn' instead"
    report.enter(Phase.LOST, reason)
