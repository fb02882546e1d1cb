"""Compiling the 8-bit graph of a set of weights: exclusive use of the GPU, progress, caching and reporting."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .. import fork_locks
from ..analysis import graph_key
from ..analysis.traced_graph import TracedGraph
from ..best_effort import best_effort
from ..compilation.build import build
from ..compilation.compile_times import CompileTimes
from ..compilation.compiled_graph import CompiledGraph
from ..compilation.cuda_graphs import lane_of
from ..compilation.graph_memory import allocates_in_graph
from ..compilation.inductor_job import Job, ModelMovedError, NotInCacheError, compile_elsewhere, is_in_cache
from ..garbage_collection import without_garbage_collection
from ..progress import Progress
from ..quantization import host_weights
from ..report.phases import Phase
from ..tensors import plain_tensors
from ..torch_internals import dynamo_interface, inductor_interface, kernel_tuning, torch_settings
from .announcement import announce
from .compiled_graphs import CompiledGraphs, InFloat, Key
from .failures import Failures
from .weight_state import WeightState, WeightStates

_log = logging.getLogger("onlinequant")

Standing = tuple[Phase, str]
_QUANTIZED: Standing = (Phase.QUANTIZED, "8-bit layers compiled by Inductor")
_UNSELECTED: Standing = (Phase.FLOAT, "no layer was selected; the float graph was compiled by Inductor")
_MOST_MOVES = 2
_background_compiles = fork_locks.rlock()
_Places = list[tuple[Any, ...]]


def standing(state: WeightState) -> Standing:
    """The phase of calls whose graph is compiled, and its reason."""
    return _QUANTIZED if state.selection else _UNSELECTED


def turn(traced: TracedGraph) -> contextlib.AbstractContextManager[None]:
    """Exclusive use of the GPU, while this thread times layers or needs the memory of another step."""
    return lane_of(traced.device).turn() if traced.provider.captures_graphs else contextlib.nullcontext()


def places(parameters: Sequence[torch.Tensor]) -> _Places:
    """The parameters' storages and devices, to detect moves: ComfyUI offloads models that are not in use."""
    plain = itertools.chain.from_iterable(map(plain_tensors, parameters))
    # While a weak reference to a storage exists, no other storage gets its address.
    return [(x.device, x.dtype, x.stride(), StorageWeakRef(x.untyped_storage())) for x in plain]


@dataclasses.dataclass
class BackgroundWork:
    """Work in another thread, during which calls go on in float.

    Attributes:
        places: where the parameters were when it began.
        result: how calls run once it has ended, and whether to log that; None if nothing has changed.
    """

    places: _Places = dataclasses.field(default_factory=list)
    result: tuple[Standing, bool] | None = None


class GraphCompiler:
    """Compiles one traced graph for the calls that need it.

    Attributes:
        graphs: what is compiled.
        background: the current work in another thread, or None.
    """

    def __init__(self, states: WeightStates, failures: Failures) -> None:
        self._states = states
        self._traced = states.traced
        self._report = states.traced.report
        self._failures = failures
        self.graphs = CompiledGraphs(states.traced, self._build)
        self.background: BackgroundWork | None = None
        self._moves = 0  # of the model, each of which made a compile fail
        self._loads = False  # the current build may only load from the cache, since a caller waits
        self._is_compiled_elsewhere = False  # the last compiled graph

    def get(self, key: Key, args: Sequence[Any], state: WeightState) -> CompiledGraph | InFloat:
        """The 8-bit graph for these sizes, or why it cannot be built."""
        with self._states.lock:
            known = self.graphs.known
            if key in known:
                return known[key]
            if known:  # another size
                state.schedule.restart()
            return self.graphs.make(key, args, state)

    def is_cached(self, state: WeightState, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether the cache most likely holds all that is needed to run the 8-bit graph within seconds."""
        entry = self._states.entry(state, parameters)
        needs_no_times = self._traced.config.selection == "density" or not self._traced.provider.times_layers
        return bool(needs_no_times or entry.load_autotuning()) and self._states.cache.has_compiled(entry.key)

    def load(self, key: Key, args: Sequence[Any], state: WeightState) -> None:
        """Load a compiled graph from the cache while the caller waits; does nothing if there is none."""
        entry = self._states.entry(state, self._traced.inputs.take_parameters(args))
        if not self._states.cache.has_compiled(entry.key):
            return  # does not wait for a process that is compiling it either
        with self._states.lock, without_garbage_collection():
            self._loads = True
            try:
                self.get(key, args, state)
            except NotInCacheError:
                pass
            finally:
                self._loads = False

    def publish_result(
        self, result: Standing, parameters: Sequence[torch.Tensor], state: WeightState, is_compiled: bool = True
    ) -> None:
        """Save the results and report how calls run from now on. ``is_compiled``: just now, which is logged."""
        report = self._report.copy()
        report.enter(*result)
        self._states.publish(state, parameters, report)
        self._report.key, self._report.stats_path = report.key, report.stats_path
        if self.background is None:
            self._report.enter(*result)
            announce(self._report, is_compiled)
        else:
            self.background.result = result, is_compiled

    def was_moved(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether work in the background may have failed because the model was moved meanwhile."""
        # Some models are moved in every run, and the error may still have another cause.
        if self.background is None or self._moves >= _MOST_MOVES:
            return False
        return self.background.places != places(parameters)

    @contextlib.contextmanager
    def moving(self, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within the block, this thread may move weights: no other thread runs a float step."""
        if self.background is None:
            yield
            return
        with turn(self._traced):
            try:
                yield
            finally:
                self.background.places = places(parameters)

    def note_move(self) -> None:
        """Count a move of the model during a compile."""
        self._moves += 1

    def _build(self, args: Sequence[Any], state: WeightState, symbolic: bool) -> CompiledGraph | InFloat:
        parameters = self._traced.inputs.take_parameters(args)
        if not state.selection and self._traced.config.compile_in_background:
            unselected = InFloat(f"no layer was selected: {self._most_common_reason()}")
            state.sample = None  # it will not be compared
            self.publish_result((Phase.FLOAT, unselected.reason), parameters, state)
            return unselected
        host_weights.free_unused()  # of models that are gone
        before = self._report.copy()
        self._enter_compiling()
        entry = self._states.entry(state, parameters)
        entry.claim()
        compiled: CompiledGraph | InFloat
        try:
            # The time spent waiting for another model's compile does not count. A compile in the background leaves
            # Dynamo's lock to threads that trace meanwhile.
            with _background_compiles if self.background is not None else dynamo_interface.compile_lock():
                compiled = self._build_timed(args, state, symbolic, entry.key)
            if self.background is not None:
                self._warm_up(compiled, args, state)
            result = standing(state)
        except NotInCacheError:
            self._report.enter_as(before)
            raise
        except Exception as error:
            if self.was_moved(parameters):
                raise ModelMovedError(f"{type(error).__name__}: {error}") from error
            if symbolic:
                raise
            compiled = InFloat(self._failures.record(error))
            state.sample = None
            result = Phase.FLOAT, compiled.reason
        self.publish_result(result, parameters, state)
        if isinstance(compiled, CompiledGraph) and self._traced.config.free_float_weights:
            freed = state.free(parameters)
            _log.info("freed %.2f GB of float weights that have 8-bit copies", freed / 1e9)
        return compiled

    def _enter_compiling(self) -> None:
        if self._loads:
            self._report.enter(Phase.LOADING, "loading from the cache")
        else:
            where = "by Inductor" if self.background is None else "in the background, calls run in float"
            self._report.enter(Phase.COMPILING, where)

    def _most_common_reason(self) -> str:
        reasons = Counter(decision.reason.partition(":")[0] for decision in self._report.decisions)
        ((reason, count),) = reasons.most_common(1)
        return f"{reason} ({count} of {len(self._report.decisions)} layers)"

    def _build_timed(self, args: Sequence[Any], state: WeightState, symbolic: bool, key: str) -> CompiledGraph:
        """``build``, with progress estimated from the times of earlier compiles, if there are any."""
        config, cache = self._traced.config, self._states.cache
        times, nodes = CompileTimes(cache.root), len(self._traced.module.graph.nodes)
        how = f"{graph_key.machine_part(key)} {config.mode} {config.regional_compilation} {symbolic}"
        source = "from the cache" if cache.has(key) else "anew"
        start, (hits, misses) = time.perf_counter(), inductor_interface.found_graphs()
        self._is_compiled_elsewhere = False
        try:
            doing = "loading from the cache" if self._loads else "compiling"
            with contextlib.ExitStack() as stack:
                with turn(self._traced):  # while no float step is changing the settings
                    stack.enter_context(torch_settings.held_settings())
                stack.enter_context(Progress(doing, expected=times.expected(f"{how} {source}", nodes)))
                directory = cache.inductor_directory(key)
                compiled = build(self._traced, args, state, symbolic, directory, beforehand=self._beforehand)
        finally:
            seconds = time.perf_counter() - start
            self._report.compile_seconds += seconds
        # Another checkpoint of this model may have left its compiled code in the cache.
        now_hits, now_misses = inductor_interface.found_graphs()
        is_found = now_hits > hits and now_misses == misses and not self._is_compiled_elsewhere
        source = "from the cache" if is_found else "anew"
        times.add(f"{how} {source}", nodes, seconds)
        return compiled

    def _beforehand(self, job: Job) -> None:
        if is_in_cache(job):
            return
        if self._loads:
            raise NotInCacheError
        self._is_compiled_elsewhere = compile_elsewhere(job)

    def _warm_up(self, compiled: CompiledGraph, args: Sequence[Any], state: WeightState) -> None:
        """Do the one-time work of the first calls now, while other calls run in float. Inductor autotunes kernels, for
        which it needs exclusive use of the GPU. CUDA graphs are captured while other threads may use the allocator.
        """
        if not self._traced.provider.captures_graphs:
            return
        start = time.perf_counter()
        with (
            best_effort("the first calls of the 8-bit graph are slow"),
            torch.no_grad(),
            kernel_tuning.tuned_in_turns(lambda: turn(self._traced)),
        ):
            for _ in range(1 if allocates_in_graph() else 2):
                compiled(args, state)
                compiled.count(args, state)
            if state.begin_check():
                state.end_check()  # discards the drift check; the next call repeats it
        _log.debug("warmed up in %.1f s", time.perf_counter() - start)
