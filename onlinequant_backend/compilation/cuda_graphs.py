"""Replays a compiled function as a CUDA graph: one launch instead of one for each of its hundreds of kernels.
Inductor's own CUDA graphs, cudagraph trees, are not used: they keep their state in the thread that compiled and fail in
any other, but ComfyUI calls models from a worker thread; also, they overwrite the outputs of earlier calls.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..tensors import getter
from ..torch_internals.allocator import compact_memory
from .graph_buffers import copied, copy_storages, storage_address, without_repetitions
from .graph_memory import (
    Waits,
    addresses_not_asked_about,
    allocates_in_graph,
    others_wait_to_synchronize,
    trim_graph_memory,
)

_log = logging.getLogger("onlinequant")
_MOST_CAPTURES = 8  # of one GraphedCall; they share memory for intermediate results, but not for outputs
_MOST_MOVES = 8  # of the weights, without a replay in between


class GraphedCall:
    """A compiled function, replayed as a CUDA graph.

    ``fixed`` tells for each argument whether its address is usually constant, like that of a weight or a scale. All
    others are copied into buffers at each call. The first call of each signature runs ``function`` directly, which does
    lazy compilation and initialisation and shows whether a graph is possible; so a size that is used once costs no
    capture. The second call captures. Only the eight most recently used signatures are kept.

    Attributes:
        reason: why the last call had no graph although it was not the first of its signature; None if it had.
        captures: how many captures were made.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, fixed: Sequence[bool]) -> None:
        self.reason: str | None = None
        self.captures = 0
        self._function = function
        self._fixed = getter([position for position, is_fixed in enumerate(fixed) if is_fixed])
        self._varying = [position for position, is_fixed in enumerate(fixed) if not is_fixed]
        self._lane = lane_of(device)
        self._known: OrderedDict[tuple[Any, ...], _Capture | None] = OrderedDict()  # None: ran once
        self._addresses: list[int] = []
        self._moves = 0
        self._gave_up = False
        self._said: set[str] = set()

    def __call__(self, *args: Any) -> Any:
        if self._gave_up:
            return self._function(*args)
        reason = self._refusal(args)
        if reason is not None:
            self._explain(reason, logging.INFO)
            return self._function(*args)
        signature = tuple(_signature(args[position]) for position in self._varying)
        addresses = list(map(torch.Tensor.data_ptr, self._fixed(args)))
        with self._lane.turn():
            capture = self._find(signature, addresses, args)
            if capture is not None:
                self.reason, self._moves = None, 0
                return capture.replay(args)
        return self._function(*args) if self._gave_up else self._run_first(signature, args)

    def release(self) -> None:
        """Free the memory of all captures; the next calls capture again."""
        with self._lane.lock:
            self._lane.wait()  # a replay may still be running there
            self._known.clear()
            self._lane.trim()

    def _refusal(self, args: Sequence[Any]) -> str | None:
        """Why this one call cannot have a graph."""
        if self._lane.is_capturing():
            return "the caller is capturing a CUDA graph itself"
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return "gradients are needed"
        for position in self._varying:
            value = args[position]
            if isinstance(value, torch.Tensor):
                if value.device != self._lane.device:  # the value of a CPU tensor would be baked into the launch
                    return f"argument {position} is on {value.device}, not on {self._lane.device}"
            elif not isinstance(value, (int, float, type(None))):
                return f"argument {position} is of type {type(value).__name__}"
        return None

    def _find(self, signature: tuple[Any, ...], addresses: list[int], args: Sequence[Any]) -> _Capture | None:
        """The capture for a call, made now if this is the second of its signature; None if it must run without one."""
        if addresses != self._addresses:
            self._known.clear()
            self._addresses = addresses
            self._moves += 1
            if self._moves > _MOST_MOVES:  # offloaded weights get other addresses each time
                self._give_up(f"its weights have moved {_MOST_MOVES} times without one replay")
        if signature not in self._known or self._gave_up:
            return None
        self._known.move_to_end(signature)
        if self._known[signature] is None:
            try:
                self._known[signature] = _Capture(self._function, args, self._varying, self._lane)
                self.captures += 1
            except Exception as error:
                what = (str(error).splitlines() or [""])[0]
                self._give_up(f"capturing failed: {type(error).__name__}: {what}", logging.WARNING)
                return None
        return self._known[signature]

    def _run_first(self, signature: tuple[Any, ...], args: Sequence[Any]) -> Any:
        """The first call of a signature. Its effects on the arguments decide whether a graph is possible."""
        inputs = [args[position] for position in self._varying if isinstance(args[position], torch.Tensor)]
        before = [(tensor, _version(tensor), tensor.clone()) for tensor in inputs]
        # Not if first calls are frequent: it would take each of them time to get memory.
        is_rare = len(self._known) < _MOST_CAPTURES and self._moves <= 1
        with compact_memory(self._lane.device) if is_rare else contextlib.nullcontext():
            outputs = self._function(*args)
        trouble = self._trouble(args, outputs, before)
        with self._lane.lock:
            if trouble is not None:
                self._give_up(trouble)
            else:
                self._known.setdefault(signature, None)
                while len(self._known) > _MOST_CAPTURES:
                    self._known.popitem(last=False)
        return outputs

    def _trouble(
        self, args: Sequence[Any], outputs: Any, before: Sequence[tuple[torch.Tensor, int, torch.Tensor]]
    ) -> str | None:
        """Why this function can never have a graph."""
        # Inductor's writes under no_grad do not increment versions, and inference tensors have none.
        if any(_version(tensor) != version or _differs(tensor, copy) for tensor, version, copy in before):
            return "it writes into its arguments"
        results = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device != self._lane.device for tensor in (*results, *self._fixed(args))):
            return f"not all of its weights and outputs are on {self._lane.device}"
        storages = {storage_address(arg) for arg in args if isinstance(arg, torch.Tensor)} - {0}  # 0: empty
        if any(storage_address(tensor) in storages for tensor in results):
            return "an output is a view of an argument"  # and must stay one, since the caller may write into it
        return None

    def _give_up(self, reason: str, level: int = logging.INFO) -> None:
        self._gave_up = True
        self._known.clear()
        self._explain(reason, level)

    def _explain(self, reason: str, level: int) -> None:
        self.reason = reason
        if reason not in self._said:
            self._said.add(reason)
            _log.log(level, "no CUDA graph: %s", reason)


class _Capture:
    """One captured call: its input buffers and the memory of its outputs."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], varying: Sequence[int], lane: _Lane) -> None:
        self._positions = [position for position in varying if isinstance(args[position], torch.Tensor)]
        arguments = list(args)
        with lane.side_stream(), torch.inference_mode(False):  # an inference tensor could not be written outside of it
            for position in self._positions:
                tensor = args[position]
                arguments[position] = torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
        self._buffers = [without_repetitions(arguments[position]) for position in self._positions]
        self._replay, self._outputs = lane.record(lambda: function(*arguments))

    def replay(self, args: Sequence[Any]) -> Any:
        for buffer, position in zip(self._buffers, self._positions, strict=True):
            buffer.copy_(without_repetitions(args[position]))
        self._replay()
        return copied(self._outputs)


class _Lane:
    """The state that all graphs of a device share: a memory pool, the capture stream, and a lock. In a shared pool one
    graph's outputs may overlap another one's intermediate results, so only one may run at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()
        self._last: torch.cuda.Stream | None = None
        self._holder: int | None = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool: Any = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock while launching; the launches wait for those of the previous turn on another stream. Reentrant:
        within a turn of the same thread this does nothing."""
        if self._holder == threading.get_ident():
            yield
            return
        with self.lock:
            stream = torch.cuda.current_stream(self.device)
            if stream != self._last:
                stream.wait_event(self._done)
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None
                self._done.record(stream)
                self._last = stream

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def side_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Memory allocated on this stream is reused only by captures, which begin with a device synchronization."""
        return torch.cuda.stream(self._stream)

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture ``run``; returns a function that replays it, and its outputs, which each replay overwrites."""
        times = [time.perf_counter()]
        if allocates_in_graph():
            run = self._on_own_memory(run)
        others = list(self._graphs)  # referenced, because torch refuses a pool whose last graph was deleted
        if not others:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # during a capture the allocator cannot free cached memory
        # cuBLAS keeps a workspace per stream. It must be allocated in the capture and must not outlive it.
        torch._C._cuda_clearCublasWorkspaces()
        unasked = addresses_not_asked_about() if allocates_in_graph() else contextlib.nullcontext()
        with compact_memory(self.device), others_wait_to_synchronize(), unasked, self.side_stream():
            try:
                # Not torch.cuda.graph: if its capture_end fails, its stream stays the current one.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                times.append(time.perf_counter())
                outputs = run()
                times.append(time.perf_counter())
                torch._C._cuda_clearCublasWorkspaces()
                graph.capture_end()
            except BaseException as error:
                # Memory allocated in the capture is freed in it, before anything else: see ``graph_memory``.
                traceback.clear_frames(error.__traceback__)
                self._recover(graph)
                raise
        self._graphs.add(graph)
        times.append(time.perf_counter())
        seconds = (after - before for before, after in itertools.pairwise(times))
        _log.debug("prepared a capture in %.2f s, captured in %.2f s, made a graph of it in %.2f s", *seconds)
        return graph.replay, outputs

    def trim(self) -> None:
        """Free the memory of deleted graphs."""
        trim_graph_memory(self.device)

    def _on_own_memory(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """``run`` with outputs that are not allocations of the graph, for an allocator that makes allocations part of
        it. If anything fails within such a capture, the next freed tensor aborts the process, and so does a tensor of
        the capture that is freed before the first replay. So ``run`` is tried first, and refused if it may synchronize
        with the GPU, which is not allowed in a capture.
        """
        with self.side_stream():
            with Waits() as waits:
                outputs = run()
            if waits.reason is not None:
                raise RuntimeError(waits.reason)
            kept = copied(outputs)
            del outputs
            self._stream.synchronize()

        def run_into_kept() -> Any:
            copy_storages(run(), kept)
            return kept

        return run_into_kept

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a failed capture: restore a usable state of stream, allocator and random generator."""
        self._graphs.clear()  # so that no other capture uses this pool
        with contextlib.suppress(Exception):
            graph.capture_end()
        with contextlib.suppress(Exception):
            # Completes capture_end after an invalid capture, and raises if nothing is left to do.
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            _broken.append(graph)
            torch._C._cuda_releasePool(self.device.index, self._pool)
        with contextlib.suppress(Exception):
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.synchronize(self.device)
            # The default generator stays in its capturing state until a capture succeeds.
            something, healthy = torch.zeros(1, dtype=torch.float32, device=self.device), torch.cuda.CUDAGraph()
            healthy.capture_begin(capture_error_mode="thread_local")
            something.zero_()
            healthy.capture_end()


_broken: list[torch.cuda.CUDAGraph] = []  # the allocator of pinned memory still queries such a graph
_lanes: dict[torch.device, _Lane] = {}
_lanes_lock = threading.Lock()


def lane_of(device: torch.device) -> _Lane:
    with _lanes_lock:
        if device.index is None:
            device = torch.device(device.type, torch.cuda.current_device())
        if device not in _lanes:
            _lanes[device] = _Lane(device)
        return _lanes[device]


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return type(value), repr(value)  # 1, 1.0 and True are equal, and so are 0.0 and -0.0


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _differs(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    return not bool(((tensor == before) | (before != before)).all())  # a NaN is not equal to itself
