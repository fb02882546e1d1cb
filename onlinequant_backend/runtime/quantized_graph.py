"""The callable that Dynamo gets: it observes, then compiles once, then runs 8 bit and watches the weights."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .. import fork_locks, tensors
from ..analysis import graph_key
from ..analysis.traced_graph import TracedGraph
from ..best_effort import going_on
from ..cache.cache_store import Cache
from ..compilation.build import build
from ..compilation.compile_times import CompileTimes
from ..compilation.compiled_graph import CompiledGraph
from ..compilation.cuda_graphs import lane_of
from ..compilation.graph_memory import allocates_in_graph, give_back_freed_memory
from ..compilation.inductor_job import Job, ModelMovedError, NotInCacheError, compile_elsewhere, is_in_cache
from ..errors import OnlineQuantError
from ..garbage_collection import uncollected
from ..graph import fx_utils, parameter_names
from ..progress import Progress, tell
from ..quantization.layer_registry import known_layers
from ..quantization.observation import Observation
from ..quantization.weight_changes import addresses_and_versions
from ..quantization.weight_copy import Call, Generation
from ..quantization.weight_identity import stand_in
from ..quantization.weight_set import WeightSet, places
from ..report.report import VISIBLE, Report, clear
from ..selection import layer_timing
from ..selection.layer_choice import Choice
from ..selection.sensitivity import measure_end_to_end
from ..tensors import getter, plain_tensors
from ..torch_internals import dynamo_interface, inductor_interface, torch_settings
from .background import Background
from .cache_entry import Entry
from .compiled_graphs import NO_VALUES, CompiledGraphs, InFloat, Key
from .drift_watch import Watch
from .sampling import SamplingRun, current_run
from .set_registry import known_sets

_log = logging.getLogger("onlinequant")


class QuantizedGraph:
    """What the backend returns for one Dynamo graph.

    Call by call: while any layer still lacks observed calls, and no earlier process has saved them, run the float
    graph, exactly, and observe. Then select, rewrite and compile, for the first shape and once more for all others,
    without Dynamo's taking part, and from then on run that.
    """

    def __init__(self, traced: TracedGraph, cache: Cache) -> None:
        self._traced = traced
        self._graph = traced.module
        self._config = traced.config
        self._precision = traced.precision
        self._device = traced.device
        self._report = traced.report
        self._infos = traced.infos
        self._may_repeat = traced.may_repeat
        self._cache = cache
        inputs = fx_utils.placeholders(self._graph)
        self._inputs = tuple(node.name for node in inputs)
        positions = {name: position for position, name in enumerate(self._inputs)}
        parameters = [position for position, node in enumerate(inputs) if fx_utils.is_parameter(node)]
        self._parameters = getter(parameters)
        self._names = list(parameter_names.parameter_names(self._graph).values())
        self._candidates = [parameters.index(positions[info.weight]) for info in self._infos]
        self._together = layer_timing.together(self._graph)
        self._grad_enabled = torch.is_grad_enabled()
        self._sets: dict[tuple[int, ...], WeightSet] = {}  # by the parameters' identities
        self._entries: weakref.WeakKeyDictionary[WeightSet, Entry] = weakref.WeakKeyDictionary()
        self._rests: weakref.WeakKeyDictionary[WeightSet, str] = weakref.WeakKeyDictionary()
        self._fingerprints: weakref.WeakKeyDictionary[WeightSet, tuple[Any, str]] = weakref.WeakKeyDictionary()
        self._layouts: dict[tuple[Any, ...], int] = {}
        self._kinds: dict[tuple[Any, ...], int] = {}
        self._compiled = CompiledGraphs(traced, self._build)
        self._watch = Watch(traced, self._keep_error)
        self._choice = Choice(traced)
        self._lock = fork_locks.rlock()
        self._gave_up = False  # on all calls; ``_has_failed`` may have been for one size
        self._has_failed = False
        self._failures = 0
        self._failed_in: weakref.ref[SamplingRun] | None = None
        self._background = Background(functools.partial(_report_fork, self._report))
        self._outcome: tuple[str, str, bool] | None = None  # what to say after the work aside
        self._places: _Places | None = None  # of the parameters, when the work aside has begun
        self._replaced = 0  # sets of weights in a row that were gone after one observed call
        self._moves = 0  # that a compile has failed with
        self._loads = False  # what is compiled now, with a caller waiting, must be in the cache
        self._is_compiled_elsewhere = False  # what was compiled last
        self._progress: Progress | None = None

    def __call__(self, *args: Any) -> Any:
        run = current_run()
        if run is not None:
            run.called.append((self._report, self._report.phase))
        if self._has_failed and self._may_try_again(run):
            self._has_failed = self._gave_up = False
            self._compiled.forget_failed()
        if self._gave_up or self._background.is_busy() or dynamo_interface.is_transforming():
            return self._run_float(args)
        if self._grad_enabled and torch.is_grad_enabled() and any(map(fx_utils.requires_grad, args)):
            # Dynamo does not guard a parameter's requires_grad. 8-bit ops have no gradient; the float graph has.
            self._runs("float", NEEDS_GRADIENTS)
            return self._run_float(args)
        with Call() as call:
            return self._run(args, call, run)

    def _run(self, args: Sequence[Any], call: Call, run: SamplingRun | None) -> Any:
        """A call that may be in 8 bit, or the float one of one that is not yet, or cannot be."""
        try:
            parameters = self._parameters(args)
            weights = self._set(parameters)
            for _ in range(_MOST_TRIES):
                call.layers = weights.layers  # before it is asked whether they are current, see ``weight_copy``
                if weights.selection is None:
                    result = self._calibrate(args, parameters, weights)
                    if weights.selection is None:
                        return result
                elif weights.is_current(parameters):
                    self._replaced = 0
                    break
                else:
                    self._follow(parameters, weights)
            else:
                self._runs("float", "another thread changes weights faster than they can be quantized")
                return self._run_float(args)
            if weights.numbers.widen(self._compiled.numbers(args)):
                weights.schedule.restart()
            key = self._compiled.key(args, weights)
            known = self._compiled.known
            if key not in known and self._may_work_aside() and self._compiled.needs_build(key, args, weights):
                self._load(key, args, weights)
                if key not in known:
                    self._finish_aside(args)
                    return self._run_float(args)
            compiled = known[key] if key in known else self._compile(key, args, weights)
            if isinstance(compiled, InFloat):
                self._runs("float", compiled.reason)
                return self._run_float(args)
            compiled.prepare(weights)
            asked = weights.begin_check()
            if asked and not self._may_repeat and not weights.end_check():
                self._follow(parameters, weights)
                return self(*args)
        except OnlineQuantError:
            raise
        except _CallersError as failed:
            raise failed.error from failed.error.__cause__
        except Exception as error:
            self._give_up(error)
            return self._run_float(args)
        self._runs(*_standing(weights))
        result, is_in_8_bit = self._watch.run(compiled, args, weights, run)
        if not is_in_8_bit:
            self._runs("float", _DID_NOT_FIT)
        # Asked only now, when the GPU has the whole step to do: it never waits for the answer. What it has made of
        # stale weights is thrown away.
        if asked and self._may_repeat and not weights.end_check():
            self._follow(parameters, weights)
            return self(*args)
        return result

    def _run_float(self, args: Sequence[Any]) -> Any:
        for weights in list(self._sets.values()):  # another thread may find one
            weights.check_not_freed(self._parameters(args))
        with self._turn() if self._background.is_busy() else contextlib.nullcontext():
            return self._graph(*args)

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        """The GPU for this thread alone, while it times layers or needs memory that another step would need as well."""
        return lane_of(self._device).turn() if self._device.type == "cuda" else contextlib.nullcontext()

    def _set(self, parameters: Sequence[torch.Tensor]) -> WeightSet:
        weights = self._sets.get(tuple(map(id, parameters)))
        return weights if weights is not None and weights.alive else self._find_set(parameters)

    def _find_set(self, parameters: Sequence[torch.Tensor]) -> WeightSet:
        """The set of a call's parameters: that of a model some of whose weights were replaced, or a new one."""
        with self._lock:
            named = dict(zip(self._names, parameters, strict=True))
            known = known_sets.predecessor(named)
            # A weight may have been given to a second layer since this graph was traced.
            numbers = places(id(parameters[candidate]) for candidate in self._candidates)
            numbers_of_names = places(self._candidates)
            layers = [
                known_layers.layer(
                    parameters[candidate],
                    info.geometry,
                    self._precision.format,
                    self._config.calibration_method,
                    old=known.layer(self._names[candidate], of_name) if known else None,
                    place=number,
                )
                for info, candidate, number, of_name in zip(
                    self._infos, self._candidates, numbers, numbers_of_names, strict=True
                )
            ]
            layout = tuple((parameter.stride(), parameter.dtype) for parameter in parameters)
            number = self._layouts.setdefault(layout, len(self._layouts))
            every = self._config.drift_check_every
            weights = WeightSet(parameters, self._names, self._candidates, layers, number, every, self._together)
            if any(layer.frozen for layer in layers):  # in another graph, which may have had no LoRA
                weights.schedule.restart()
            # To a LoRA applies what was found out about the model.
            weights.is_compared = known is not None and known.is_compared and known in self._sets.values()
            known_sets.add(weights)
            for old in list(self._sets.values()):
                if old.is_dead() or known_sets.is_successor(named, old):
                    self._replaced += old.is_dead() and old.was_called_once()
                    self._retire(old)
            self._sets[weights.ids] = weights
            if self._replaced >= _MOST_REPLACED and not self._gave_up:
                self._gave_up = True
                self._say("float", _REPLACED)
            return weights

    def _retire(self, old: WeightSet) -> None:
        """Give up what a set holds that another one now takes the place of. It stays known for as long as it can be
        called: its weights may be put back, or another model may have them as well."""
        if not old.alive:
            del self._sets[old.ids]
        old.extras.clear()
        if old in self._entries:
            self._entries.pop(old).release()

    def _calibrate(self, args: Sequence[Any], parameters: Sequence[torch.Tensor], weights: WeightSet) -> Any:
        """Observe one call in float and return its result. If there is nothing left to observe, select instead."""
        if self._compiled.is_empty(args):
            self._runs("float", NO_VALUES.reason)
            return self._run_float(args)
        if self._report.phase != "calibrating":  # it may be so for another reason
            self._runs("calibrating", "observing in float")
        with contextlib.ExitStack() as locks:
            for lock in (self._lock, weights.layers[0].lock):
                # Another graph of this model may be about to be compiled in the background, which takes its time.
                if not lock.acquire(blocking=not self._may_work_aside()):
                    return self._run_float(args)
                locks.callback(lock.release)
            if weights.selection is not None:
                return None
            if not weights.is_calibrated() and weights not in self._entries:
                entry = self._entry(weights, parameters)
                restored = entry.restore(weights.layers)
                self._report.cache_hit = self._report.cache_hit or restored
                if restored:
                    self._take_over(entry, parameters, weights)
            if weights.is_calibrated():
                # Quick are another set of weights, for which there is no compile, and what another process has left.
                if self._may_work_aside() and not self._compiled.known and not self._is_left(weights, parameters):
                    self._finish_aside(args)
                    return self._run_float(args)
                self._select(args, parameters, weights)
                if weights.selection is None:
                    return self._calibrate(args, parameters, weights)
                return None
            return self._observe(args, parameters, weights)

    def _take_over(self, entry: Entry, parameters: Sequence[torch.Tensor], weights: WeightSet) -> None:
        """Go on from what another process has observed of these weights."""
        self._rests[weights] = self._rest(weights, parameters)
        error = entry.load_error()
        # Its first step was, which this process need not do in float again; unless there is something to be said of it.
        weights.is_compared = error is not None and error < VISIBLE
        if self._report.error is None:
            self._report.error = error

    def _observe(self, args: Sequence[Any], parameters: Sequence[torch.Tensor], weights: WeightSet) -> Any:
        run = current_run()
        if run is not None and run.is_observed:
            self._report.calibration_steps = run.steps
            self._show_progress(run.step, run.steps)
            finish = self._finish_aside if self._may_work_aside() else self._finish
            run.at_end((self, weights), functools.partial(finish, args))
            last = False
        else:
            step = weights.calls() + 1
            last = step >= self._config.calibration_steps
            self._show_progress(step, self._config.calibration_steps)
        try:
            with weights.observed_or_not():
                result = self._call_observed(args, parameters, weights, last)
        except Exception as error:
            return self._do_unobserved(args, error)
        weights.numbers.widen(self._compiled.numbers(args))
        weights.count_call(self._fingerprint(weights, parameters, again=last), self._traced.operations)
        if not weights.was_called_once():
            self._replaced = 0
        self._report.calls_observed = weights.calls()
        if last:
            self._end_observing(args, weights, result)
        return result

    def _do_unobserved(self, args: Sequence[Any], error: Exception) -> Any:
        """The float result of a call that has failed while it was observed; the next one is observed again. What float
        raises as well is the caller's, and no reason to give up."""
        result = None
        if self._may_repeat:
            try:
                result = self._run_float(args)
            except Exception as caller_error:
                raise _CallersError(caller_error) from None
        if self._failures >= _MOST_FAILURES:
            self._give_up(error)
        else:
            self._failures += 1
            _log.warning("a call could not be observed, so the next one is: %s: %s", type(error).__name__, error)
        if not self._may_repeat:  # whoever's it is, it has been half done
            raise _CallersError(error)
        return result

    def _call_observed(
        self, args: Sequence[Any], parameters: Sequence[torch.Tensor], weights: WeightSet, last: bool
    ) -> Any:
        candidates = [index for index, info in enumerate(self._infos) if info.quantized]
        weights.check_not_freed(parameters)
        if last and self._device.type == "cuda":  # it calls the kernels of every layer
            layer_timing.compile_ahead(self._graph, self._precision.format, self._device)
            give_back_freed_memory(self._device)  # before the copies, which stay, come to lie in it
        turn = self._turn() if self._places is not None else contextlib.nullcontext()
        floats = [parameters[position] for position in self._candidates]
        room = weights.room(parameters, candidates) if last else contextlib.nullcontext()  # their errors are measured
        with turn, torch.no_grad(), room:
            return self._traced.observed(*args, Observation(weights.layers, floats, last, kept=frozenset(candidates)))

    def _end_observing(self, args: Sequence[Any], weights: WeightSet, result: Any) -> None:
        if self._config.sensitivity == "end_to_end":
            measure_end_to_end(self._traced.observed, args, weights.layers, self._infos, result)
        self._rests[weights] = self._rest(weights, self._parameters(args))
        weights.freeze()

    def _may_work_aside(self) -> bool:
        config = self._config
        if not config.compile_in_background or config.free_float_weights or not self._may_repeat:
            return False
        # Belongs to a thread and is compiled in.
        return not torch.is_autocast_enabled(self._device.type)

    def _finish_aside(self, args: Sequence[Any]) -> None:
        """``_finish`` in another thread; calls are in float until that is done."""
        if self._gave_up:
            return
        inputs = fx_utils.placeholders(self._graph)
        # The caller may write into what it has passed as soon as this has returned.
        kept = [
            value
            if fx_utils.is_parameter(node) or not isinstance(value, torch.Tensor)
            else tensors.clone_preserving_strides(value)
            for node, value in zip(inputs, args, strict=True)
        ]

        before = self._report.phase, self._report.phase_reason

        def work() -> None:
            self._outcome = None
            self._report.phase, self._report.phase_reason = "compiling", "in the background, float goes on"
            self._finish(kept, aside=True)

        def conclude() -> None:
            if not self._gave_up:
                self._say(*(self._outcome or (*before, False)))

        self._background.start(work, conclude, self._device)

    def _finish(self, args: Sequence[Any], aside: bool = False) -> None:
        """Whatever is missing until calls like this one run in 8 bit: at the end of an observed run, or aside.

        ``aside``: then nobody hears of a user's mistake, and the model may be moved meanwhile.
        """
        parameters = self._parameters(args)
        where = _places(parameters)
        try:
            with self._lock, self._traced.state.autocasting(), Call() as call:
                self._places = where if aside else None
                weights = self._set(parameters)
                call.layers = weights.layers
                if self._gave_up:
                    return
                if weights.selection is None:
                    self._end_run(args, parameters, weights)
                if weights.selection is not None:
                    self._compile(self._compiled.key(args, weights), args, weights)
        except Exception as error:
            if self._was_moved(parameters):
                self._moves += 1
                _log.warning("the model was moved while it was compiled, so that is done again: %s", error)
                return
            if isinstance(error, OnlineQuantError) and not aside:
                raise
            self._give_up(error)
        finally:
            self._places = None

    def _warm_up(self, compiled: CompiledGraph, args: Sequence[Any], weights: WeightSet) -> None:
        """Do now what the first calls do beside computing, while others go on in float.

        Inductor measures which configuration of a kernel is the fastest, for which it must have the GPU for itself.
        CUDA graphs are captured where others may use the allocator meanwhile.
        """
        if self._device.type != "cuda":
            return
        start = time.perf_counter()
        with (
            going_on("the first calls in 8 bit are slow"),
            torch.no_grad(),
            inductor_interface.tuned_in_turns(self._turn),
        ):
            for _ in range(1 if allocates_in_graph() else 2):
                compiled(args, weights)
                compiled.count(args, weights)
            if weights.begin_check():
                weights.end_check()  # what it finds is found again by the next call
        _log.debug("warmed up in %.1f s", time.perf_counter() - start)

    def _end_run(self, args: Sequence[Any], parameters: Sequence[torch.Tensor], weights: WeightSet) -> None:
        with weights.layers[0].lock:
            if not weights.is_calibrated():
                # Which call is the last one nobody knows before: so its sensitivities are measured after it.
                result = self._call_observed(args, parameters, weights, last=True)
                self._end_observing(args, weights, result)
            self._select(args, parameters, weights)

    def _entry(self, weights: WeightSet, parameters: Sequence[torch.Tensor]) -> Entry:
        if weights not in self._entries:
            known = self._fingerprint(weights, parameters)
            operations = self._traced.operations
            how = self._config, self._precision, self._device, self._traced.state, operations
            key = graph_key.entry_key(self._graph, self._infos, known, *how)
            self._report.key = key
            entry = self._entries[weights] = Entry(self._cache, key, self._infos, self._config.lock_timeout, operations)
            weakref.finalize(stand_in(parameters[0]), entry.release).atexit = False  # the model was dropped
        return self._entries[weights]

    def _settle(
        self,
        phase: str,
        reason: str,
        parameters: Sequence[torch.Tensor],
        weights: WeightSet,
        is_compiled: bool = True,
    ) -> None:
        """Keep what came out, and say how calls run from now on: until work aside is over, they are in float.

        ``is_compiled``: now, for which the log has a line.
        """
        report = self._report.copy()
        report.phase, report.phase_reason = phase, reason
        autotuning = layer_timing.dump(self._graph, self._precision.format) if self._device.type == "cuda" else None
        fingerprint = self._fingerprint(weights, parameters)
        self._entry(weights, parameters).publish(weights.layers, fingerprint, report, autotuning)
        self._report.key, self._report.stats_path = report.key, report.stats_path
        named = dict(zip(self._names, parameters, strict=True))
        for other in list(self._entries):  # of weights that were in the model while it was observed
            if other is not weights and known_sets.is_successor(named, other):
                self._entries.pop(other).release()
        if self._places is None:
            self._say(phase, reason, is_compiled)
        else:
            self._outcome = phase, reason, is_compiled

    def _runs(self, phase: str, reason: str) -> None:
        """Have the report say what the call that goes on does: other sizes or weights may do otherwise."""
        if self._report.phase_reason is not reason and not self._gave_up:
            self._report.phase, self._report.phase_reason = phase, reason

    def _keep_error(self, weights: WeightSet, error: float) -> None:
        if weights in self._entries and self._report.stats_path is not None:
            self._entries[weights].save_error(self._report, error)

    def _say(self, phase: str, reason: str, in_log: bool = True) -> None:
        self._report.phase, self._report.phase_reason = phase, reason
        if in_log:
            _log.info("%s", self._report.summary())
        tell(self._report.summary())

    def _fingerprint(self, weights: WeightSet, parameters: Sequence[torch.Tensor], again: bool = True) -> str:
        """``again=False``: the one that was taken last will do while no address and no version has changed, for to look
        at every weight takes a fifth of a small step."""
        if weights.has_freed():  # and so has not changed since it was calibrated
            return weights.layers[0].calibrated_for
        state = addresses_and_versions(parameters)  # before that: another thread may change a weight meanwhile
        known_state, known = self._fingerprints.get(weights, (None, ""))
        if again or known_state is None or state != known_state:
            known = graph_key.fingerprint(dict(zip(self._names, parameters, strict=True)))
            self._fingerprints[weights] = state, known
        return known

    def _show_progress(self, step: int, steps: int) -> None:
        if self._progress is None or step == 1:  # a run may have been interrupted
            self._progress = Progress("observing", steps)
        self._progress.advance(to=step)
        if step >= steps:
            self._progress.close()
            self._progress = None

    def _select(self, args: Sequence[Any], parameters: Sequence[torch.Tensor], weights: WeightSet) -> None:
        """Put the selected layers of a set in 8 bit. The graph's first set to get here decides which these are.

        None are if another checkpoint was loaded since the last observed call."""
        rest = self._rest(weights, parameters)
        if self._rests.setdefault(weights, rest) != rest:
            self._start_over(weights)
            return
        weights.quantize(parameters, [i for i, info in enumerate(self._infos) if info.quantized])
        refusals = [layer.refusal() for layer in weights.layers]
        if not self._choice.is_made:
            self._choice.make(args, weights, refusals, self._entry(weights, parameters).load_autotuning)
            weights.is_compared = weights.is_compared or self._config.max_error is not None  # for which it was measured
        chosen = tuple(i for i, info in enumerate(self._infos) if info.quantized and not refusals[i])
        alike = list(weights.smoothing().values())
        pattern = tuple((i, alike.index(factors)) for i, factors in weights.smoothing().items())
        weights.kind = self._kinds.setdefault((weights.layout, chosen, pattern), len(self._kinds))
        weights.select(parameters, chosen)
        # A LoRA may have come since the last observed call. What comes from now on is noticed by ``is_current``.
        fingerprint = self._fingerprint(weights, parameters)
        if not weights.is_calibrated_for(fingerprint, self._traced.operations):
            weights.schedule.restart()
        if self._compiled.known and weights in self._entries:  # no compile will come, after which it would be published
            self._settle(*_standing(weights), parameters, weights, is_compiled=False)

    def _follow(self, parameters: Sequence[torch.Tensor], weights: WeightSet) -> None:
        """Quantize changed weights again, in place. If everything else has changed as well, calibrate anew."""
        with self._lock:
            if weights.selection is None:
                return
            start = time.perf_counter()
            try:
                weights.follow(parameters)
                self._heed(parameters, weights)
            except BaseException:  # an interrupt, say: what is left to do is done at the next call
                weights.generation = -1
                raise
            seconds = time.perf_counter() - start
            if weights.changed:
                _log.info("quantized %d changed weights again in %.2f s", len(weights.changed), seconds)
            weights.changed.clear()

    def _heed(self, parameters: Sequence[torch.Tensor], weights: WeightSet) -> None:
        """Look at what weights that have changed do to the activations, and observe another checkpoint's."""
        if weights.changed:
            weights.schedule.restart()
        assert weights.selection is not None
        if not weights.is_calibrated():  # another graph of this model has come to the conclusion below
            weights.selection = None
            return
        have_all_changed = weights.changed >= {weights.layers[index].copy for index in weights.selection}
        # A LoRA leaves biases and norms as they are; moving the model changes no value.
        if weights.selection and have_all_changed and self._rest(weights, parameters) != self._rests[weights]:
            self._start_over(weights)

    @staticmethod
    def _rest(weights: WeightSet, parameters: Sequence[torch.Tensor]) -> str:
        return graph_key.fingerprint(weights.rest(parameters))

    def _start_over(self, weights: WeightSet) -> None:
        """Observe a set anew, which now holds another checkpoint."""
        _log.info("another checkpoint was loaded, so it is calibrated anew")
        weights.start_over()
        del self._rests[weights]
        self._entries.pop(weights, None)
        self._choice.is_made = False
        self._report.phase, self._report.phase_reason = "calibrating", "another checkpoint was loaded"

    def _compile(self, key: Key, args: Sequence[Any], weights: WeightSet) -> CompiledGraph | InFloat:
        """The 8-bit graph for these sizes, or why it cannot be built."""
        with self._lock:
            known = self._compiled.known
            if key in known:
                return known[key]
            if known:  # another size
                weights.schedule.restart()
            return self._compiled.make(key, args, weights)

    def _is_left(self, weights: WeightSet, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether another process has most likely left all that it takes to run in 8 bit within seconds."""
        entry = self._entry(weights, parameters)
        is_timed = self._device.type != "cuda" or self._config.selection == "density" or entry.load_autotuning()
        return bool(is_timed) and self._cache.has_compiled(entry.key)

    def _load(self, key: Key, args: Sequence[Any], weights: WeightSet) -> None:
        """Take a compiled graph from the cache, while the caller waits; nothing where there is none."""
        if not self._cache.has_compiled(self._entry(weights, self._parameters(args)).key):
            return  # neither wait for whoever is about to make it
        with self._lock, uncollected():
            self._loads = True
            try:
                self._compile(key, args, weights)
            except NotInCacheError:
                pass
            finally:
                self._loads = False

    def _beforehand(self, job: Job) -> None:
        if is_in_cache(job):
            return
        if self._loads:
            raise NotInCacheError
        self._is_compiled_elsewhere = compile_elsewhere(job)

    def _build(self, args: Sequence[Any], weights: WeightSet, symbolic: bool) -> CompiledGraph | InFloat:
        parameters = self._parameters(args)
        if not weights.selection and self._config.compile_in_background:
            unselected = InFloat(f"no layer was selected: {self._most_common_reason()}")
            self._settle("float", unselected.reason, parameters, weights)
            return unselected
        before = self._report.phase, self._report.phase_reason
        beside = "in the background, float goes on" if self._places is not None else "by Inductor"
        self._report.phase, self._report.phase_reason = "compiling", "loading from the cache" if self._loads else beside
        entry = self._entry(weights, parameters)
        entry.claim()
        compiled: CompiledGraph | InFloat
        try:
            # Waiting for another model's compile is no part of this one's. One in the background leaves Dynamo's lock
            # to those who trace meanwhile.
            with _background_compiles if self._places is not None else dynamo_interface.compile_lock():
                compiled = self._build_timed(args, weights, symbolic, entry.key)
            if self._places is not None:
                self._warm_up(compiled, args, weights)
            standing = _standing(weights)
        except NotInCacheError:
            self._report.phase, self._report.phase_reason = before
            raise
        except Exception as error:
            if self._was_moved(parameters):
                raise ModelMovedError(f"{type(error).__name__}: {error}") from error
            if symbolic:
                raise
            standing = self._stay_in_float(error)
            compiled = InFloat(standing[1])
        self._settle(*standing, parameters, weights)
        if isinstance(compiled, CompiledGraph) and self._config.free_float_weights:
            freed = weights.free(parameters)
            _log.info("freed %.2f GB of float weights that have 8-bit copies", freed / 1e9)
        return compiled

    def _most_common_reason(self) -> str:
        reasons = Counter(decision.reason.partition(":")[0] for decision in self._report.decisions)
        ((reason, count),) = reasons.most_common(1)
        return f"{reason} ({count} of {len(self._report.decisions)} layers)"

    def _was_moved(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether what has failed aside may have failed because the model is not where it was."""
        # Some are moved in every run, and an error may come from something else all the same.
        return self._moves < _MOST_MOVES and self._places not in (None, _places(parameters))

    def _build_timed(self, args: Sequence[Any], weights: WeightSet, symbolic: bool, key: str) -> CompiledGraph:
        """``build``, with how long it will take, as far as earlier ones tell."""
        times, nodes = CompileTimes(self._cache.root), len(self._graph.graph.nodes)
        how = f"{graph_key.machine_part(key)} {self._config.mode} {self._config.regional_compilation} {symbolic}"
        source = "from the cache" if self._cache.has(key) else "anew"
        start, (hits, misses) = time.perf_counter(), inductor_interface.found_graphs()
        self._is_compiled_elsewhere = False
        try:
            doing = "loading from the cache" if self._loads else "compiling"
            with contextlib.ExitStack() as stack:
                with self._turn():  # no step in float has changed them
                    stack.enter_context(torch_settings.held_settings())
                stack.enter_context(Progress(doing, expected=times.expected(f"{how} {source}", nodes)))
                directory = self._cache.inductor_directory(key)
                compiled = build(
                    *(self._graph, args, weights, self._config, self._precision, symbolic, directory),
                    beforehand=self._beforehand,
                )
        finally:
            seconds = time.perf_counter() - start
            self._report.compile_seconds += seconds
        # Another checkpoint of this model may have left its code.
        now_hits, now_misses = inductor_interface.found_graphs()
        is_found = now_hits > hits and now_misses == misses and not self._is_compiled_elsewhere
        source = "from the cache" if is_found else "anew"
        times.add(f"{how} {source}", nodes, seconds)
        return compiled

    def _give_up(self, error: Exception) -> None:
        self._gave_up = True
        self._say(*self._stay_in_float(error))

    def _may_try_again(self, run: SamplingRun | None) -> bool:
        """Whether a new sampling run has begun since it failed: what went wrong, such as a lack of memory, may be
        over."""
        if run is None or self._failures > _MOST_FAILURES or self._background.is_busy():
            return False
        return self._failed_in is None or self._failed_in() is not run

    def _stay_in_float(self, error: Exception) -> tuple[str, str]:
        """Whatever went wrong, the user's model still works. Returns the phase, and why."""
        run = current_run()
        self._has_failed = True
        self._failures += 1
        self._failed_in = None if run is None else weakref.ref(run)
        _log.exception("onlinequant failed, so the model goes on in float")
        for entry in self._entries.values():
            entry.release()
        return "float", f"it failed: {type(error).__name__}: {error}"


class _CallersError(Exception):
    """``error`` is what the caller gets: the model raises it in float as well."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _report_fork(report: Report) -> None:
    reason = "this process was forked from one that was compiling in the background; start it by 'spawn' instead"
    report.phase, report.phase_reason = "float", reason


def _standing(weights: WeightSet) -> tuple[str, str]:
    """The phase, and why, of calls whose graph is compiled."""
    return _QUANTIZED if weights.selection else _UNSELECTED


NEEDS_GRADIENTS = "gradients are needed and 8-bit layers have none; call the model under torch.no_grad() for 8 bit"
_QUANTIZED = "quantized", "8-bit layers compiled by Inductor"
_UNSELECTED = "float", "no layer was selected; the float graph was compiled by Inductor"
_DID_NOT_FIT = "its values did not fit the observed ranges, or were not finite; the next call is in 8 bit again"
_background_compiles = fork_locks.rlock()
_MOST_MOVES, _MOST_FAILURES, _MOST_TRIES, _MOST_REPLACED = 2, 2, 10, 8
_REPLACED = (
    "its weights are other tensors at each call, as sequential offload makes them, so that they cannot be observed for "
    "several calls; move the model as a whole instead, as enable_model_cpu_offload() does"
)
_Places = list[tuple[Any, ...]]


def _places(parameters: Sequence[torch.Tensor]) -> _Places:
    """Where and what they are: ComfyUI moves models away that are not being called, and back."""
    plain = itertools.chain.from_iterable(map(plain_tensors, parameters))
    # Nothing else gets the address of a storage that is known weakly.
    return [(x.device, x.dtype, x.stride(), StorageWeakRef(x.untyped_storage())) for x in plain]


# Those that Dynamo still has, by model and ``graph_key.identity``: what it traces a second time is not compiled again.
graphs: weakref.WeakValueDictionary[tuple[str, str], QuantizedGraph] = weakref.WeakValueDictionary()


def invalidate(module: torch.nn.Module) -> int:
    """Forget the 8-bit copies of ``module``'s weights: the next call quantizes them again.

    Only needed after a change that leaves no trace: a few values of a weight, written through ``.data``.
    Returns how many 8-bit copies were forgotten.
    """
    return known_layers.forget_weights(list(module.parameters()))


def release(module: torch.nn.Module) -> int:
    """Give back the memory of the 8-bit copies of ``module``'s weights and of the CUDA graphs that run on them.

    The next call makes them again, from the float weights that it brings along, without compiling. Returns the copies'
    size in bytes. Copies whose float weights were given up (``free_float_weights``) stay.
    """
    return known_sets.release(list(module.parameters()))


def copied_bytes(module: torch.nn.Module) -> int:
    """The size in bytes of the 8-bit copies that ``module`` runs on; 0 while there are none."""
    when, size = _copied_bytes.get(module, (-1, 0))
    if when != Generation.copies:  # ComfyUI asks several times a run, and to list the parameters takes milliseconds
        when, size = _copied_bytes[module] = Generation.copies, known_sets.copied_bytes(list(module.parameters()))
    return size


_copied_bytes: weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, int]] = weakref.WeakKeyDictionary()


def reset() -> None:
    """Forget everything in this process: observed ranges, 8-bit weights and reports.

    Compiled models go on as they are; ``torch._dynamo.reset()`` makes them start anew.
    """
    known_layers.clear()
    known_sets.clear()
    _copied_bytes.clear()
    graphs.clear()
    clear()
