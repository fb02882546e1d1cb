"""The callable that Dynamo gets: it observes, then compiles, then runs the 8-bit graph and checks the weights."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..analysis.traced_graph import TracedGraph
from ..cache.cache_store import Cache
from ..compilation.compiled_graph import CompiledGraph
from ..errors import OnlineQuantError
from ..graph import fx_utils
from ..quantization.weight_copy import Call
from ..report.phases import Phase
from ..torch_internals import dynamo_interface
from .calibration import Calibration
from .compiled_graphs import InFloat
from .drift_watch import DriftWatch
from .failures import CallersError, Failures
from .finisher import Finisher
from .graph_compiler import GraphCompiler, standing
from .observer import Observer
from .sampling import SamplingRun, current_run
from .selector import Selector
from .weight_state import WeightState, WeightStates

NEEDS_GRADIENTS = "gradients are needed, but 8-bit layers have none; call the model under torch.no_grad() for them"
_DID_NOT_FIT = "its values did not fit the observed ranges, or were not finite; the next call is quantized again"
_RACE = "another thread changes weights faster than they can be quantized"
_MOST_TRIES = 10


class QuantizedGraph:
    """The callable that the backend returns for one Dynamo graph.

    While any layer lacks observed calls, and the cache has no calibration, each call runs the unchanged float graph and
    is observed. Then layers are selected, and the graph is rewritten and compiled without Dynamo: for the first shape,
    and once more for all others. From then on calls run the compiled graph.
    """

    def __init__(self, traced: TracedGraph, cache: Cache) -> None:
        self._traced = traced
        self._report = traced.report
        self._grad_enabled = torch.is_grad_enabled()
        self._states = WeightStates(traced, cache)
        self._failures = Failures(self._states)
        self._compiler = GraphCompiler(self._states, self._failures)
        self._selector = Selector(self._states, self._compiler)
        observer = Observer(self._states, self._compiler)
        self._finisher = Finisher(self._states, self._failures, self._compiler, observer, self._selector)
        self._calibration = Calibration(
            self._states, self._failures, self._compiler, observer, self._selector, self._finisher
        )
        self._watch = DriftWatch(traced, self._keep_error, self._keep_accepted, self._compiler.graphs.key)

    def __call__(self, *args: Any) -> Any:
        run = current_run()
        if run is not None:
            run.called.append((self._report, self._report.phase))
        is_busy = self._finisher.is_busy()
        if not is_busy and self._failures.may_retry(run):
            self._failures.retry()
            self._compiler.graphs.forget_failed()
        if self._failures.gave_up or is_busy or dynamo_interface.is_transforming():
            return self._finisher.run_float(args)
        if self._grad_enabled and torch.is_grad_enabled() and any(map(fx_utils.requires_grad, args)):
            # Dynamo does not guard a parameter's requires_grad. 8-bit ops have no gradient; the float graph has.
            return self._run_float(args, NEEDS_GRADIENTS)
        try:
            with Call() as call:
                return self._run(args, call, run)
        except CallersError as failed:
            raise failed.error from failed.error.__cause__

    def _run(self, args: Sequence[Any], call: Call, run: SamplingRun | None) -> Any:
        """The result of a call: of the 8-bit graph if possible, else of the float graph."""
        parameters = self._traced.inputs.take_parameters(args)
        try:
            state = self._states.of(parameters)
            for _ in range(_MOST_TRIES):
                call.layers = state.layers  # before the check whether they are current, see ``weight_copy``
                if state.selection is None:
                    result = self._calibration.run(args, parameters, state)
                    if state.selection is None:
                        return result
                elif state.is_current(parameters):
                    self._states.replaced = 0
                    break
                else:
                    self._selector.follow(parameters, state)
            else:
                return self._run_float(args, _RACE)
            compiled = self._compiled(args, state)
            if not isinstance(compiled, CompiledGraph):
                return self._run_float(args, None if compiled is None else compiled.reason)
            compiled.prepare(state)
            is_checked = state.begin_check()
            if is_checked and not self._traced.may_repeat and not state.end_check():
                return self._run_again(args, parameters, state)
        except (OnlineQuantError, CallersError):
            raise
        except Exception as error:
            self._failures.give_up(error)
            return self._finisher.run_float(args)
        self._report.enter(*standing(state))
        result, is_in_8_bit = self._watch.run(compiled, args, state, run)
        if not is_in_8_bit:
            self._report.enter(Phase.FLOAT, _DID_NOT_FIT)
        # Checked only now, when all kernels of the step are queued, so that the GPU never waits for the check. A result
        # of stale weights is discarded.
        if is_checked and self._traced.may_repeat and not state.end_check():
            return self._run_again(args, parameters, state)
        return result

    def _run_again(self, args: Sequence[Any], parameters: Sequence[torch.Tensor], state: WeightState) -> Any:
        """Repeat a call whose weights changed on the GPU without a change of version. Another model that shares the
        weights may have quantized them already: then only this call shows that activations may have changed."""
        state.schedule.restart()
        self._selector.follow(parameters, state)
        return self(*args)

    def _compiled(self, args: Sequence[Any], state: WeightState) -> CompiledGraph | InFloat | None:
        """The graph for a call; None while another thread compiles it."""
        graphs = self._compiler.graphs
        is_first = not state.numbers.are_known  # of a set whose calibration was restored
        if state.numbers.widen(graphs.numbers(args)):
            state.schedule.restart(in_float=is_first)
        key = graphs.key(args, state)
        known = graphs.known.get(key)
        if known is not None:
            return known
        if self._finisher.may_use_background() and graphs.needs_build(key, args, state):
            self._compiler.load(key, args, state)
            if key not in graphs.known:
                self._finisher.finish_in_background(args)
                return None
        return self._compiler.get(key, args, state)

    def _run_float(self, args: Sequence[Any], reason: str | None) -> Any:
        if reason is not None:
            self._report.enter(Phase.FLOAT, reason)
        return self._finisher.run_float(args)

    def _keep_error(self, state: WeightState, error: float) -> None:
        if state.entry is not None and self._report.stats_path is not None:
            state.entry.save_error(self._report, error)

    def _keep_accepted(self, args: Sequence[Any], state: WeightState) -> None:
        """Keep the next process from repeating in float what this one has."""
        if state.entry is not None and self._report.stats_path is not None:
            parameters = self._traced.inputs.take_parameters(args)
            state.entry.save_accepted(state.layers, state.fingerprint(parameters), self._report)


# Graphs that Dynamo still holds, by model and ``graph_key.identity``: a graph traced again is not compiled again.
graphs: weakref.WeakValueDictionary[tuple[str, str], QuantizedGraph] = weakref.WeakValueDictionary()
