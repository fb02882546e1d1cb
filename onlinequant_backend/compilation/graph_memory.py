"""CUDA graphs with CUDA's own allocator, ``backend:cudaMallocAsync``, which ComfyUI turns on. Where torch's allocator
keeps a pool for a graph, this one makes each allocation and each free within a capture part of the graph. This has two
consequences. Memory that was allocated in a capture exists only while the graph runs, so the outputs must be elsewhere.
And freeing such memory fails after a failed capture, or before the first replay; torch frees in destructors, in which
an error aborts the process. So nothing that may fail must be captured.

Also, Triton queries the driver for each pointer argument of a launch, and the driver does not know addresses that exist
only while the graph runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_log = logging.getLogger("onlinequant")
_patching = threading.RLock()

# Other libraries' operators may do anything, such as synchronize with the GPU.
_KNOWN_OPERATORS = ("aten", "onlinequant", "prims", "inductor")
# The sizes of their results depend on values, or the results are Python numbers, so they synchronize with the GPU.
_WAITING_TAGS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


@functools.cache
def allocates_in_graph() -> bool:
    """Whether this process uses that allocator. It cannot be changed after the first tensor."""
    return torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "cudaMallocAsync"


class Waits(TorchDispatchMode):
    """Within the block, detects operators that may synchronize with the GPU.

    Attributes:
        reason: the first one found; None for none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reason: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.reason is None:
            self.reason = self._why(func, tree_leaves((args, kwargs or {})), tree_leaves(result))
        return result

    def _why(self, func: Any, given: list[Any], results: list[Any]) -> str | None:
        if func.namespace not in _KNOWN_OPERATORS:
            return f"{func} may wait for the GPU"
        if any(tag in func.tags for tag in _WAITING_TAGS):
            return f"{func} waits for the GPU"
        # A CPU tensor without dimensions is passed by value with the launch; other tensors are copied.
        copied = [x for x in given if isinstance(x, torch.Tensor) and x.dim()]
        made = [x for x in results if isinstance(x, torch.Tensor)]
        if len({tensor.device.type for tensor in (*copied, *made)}) > 1:
            return f"{func} copies between devices"
        return None


@contextlib.contextmanager
def addresses_not_asked_about() -> Iterator[None]:
    """Within the block, Triton's and Inductor's launchers get addresses as plain numbers, which they do not query."""
    from torch._inductor.runtime import static_triton_launcher
    from triton.backends.nvidia.driver import CudaLauncher

    inductors: Any = static_triton_launcher.StaticallyLaunchedTritonKernel.run
    namespace, original_code, original_call = inductors.__globals__, inductors.__code__, CudaLauncher.__call__

    def call_with_numbers(self: Any, *args: Any) -> Any:
        return original_call(self, *_numbers(*args))

    with _patching:
        # Compiled graphs hold a reference to this function, so its code is changed rather than the function replaced.
        namespace["_onlinequant_run"] = types.FunctionType(original_code, namespace)
        namespace["_onlinequant_numbers"] = _numbers
        inductors.__code__ = _run_with_numbers.__code__
        CudaLauncher.__call__ = call_with_numbers
        try:
            yield
        finally:
            inductors.__code__ = original_code
            CudaLauncher.__call__ = original_call


def _numbers(*args: Any) -> list[Any]:
    return [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]


def _run_with_numbers(self: Any, grid_x: int, grid_y: int, grid_z: int, stream: int, *args: Any) -> None:
    """The replacement code of Inductor's ``StaticallyLaunchedTritonKernel.run``; it uses the globals of that module."""
    numbers = _onlinequant_numbers(*args)  # type: ignore[name-defined]  # noqa: F821
    _onlinequant_run(self, grid_x, grid_y, grid_z, stream, *numbers)  # type: ignore[name-defined]  # noqa: F821


@contextlib.contextmanager
def others_wait_to_synchronize() -> Iterator[None]:
    """Within the block, other threads that call a device synchronization wait for the end of the block first: it would
    invalidate this thread's capture."""
    me, done = threading.get_ident(), threading.Event()

    def waiting(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wait_then_call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != me:
                done.wait()
            return function(*args, **kwargs)

        return wait_then_call

    with _patching:
        originals = {name: getattr(torch.cuda, name) for name in ("synchronize", "empty_cache")}
        for name, original in originals.items():
            setattr(torch.cuda, name, waiting(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(torch.cuda, name, original)
            done.set()


def trim_graph_memory(device: torch.device | None) -> None:
    """Free the memory that graphs do not use at the moment, which is all of it while none runs: the driver keeps it for
    the next one, and torch does not track it. Does nothing with another allocator."""
    if device is None or device.type != "cuda" or not allocates_in_graph():
        return
    try:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            code = _driver().cuDeviceGraphMemTrim(device.index or 0)
    except (OSError, AttributeError) as error:
        code = error
    if code:
        _log.info("the memory of CUDA graphs was not freed: %s", code)


def give_back_freed_memory(device: torch.device | None) -> None:
    """Free the memory of freed tensors that torch caches: graphs cannot use it, and allocate as much again from the
    driver. Does nothing with another allocator."""
    if device is not None and device.type == "cuda" and allocates_in_graph():
        torch.cuda.empty_cache()


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ctypes.CDLL("nvcuda.dll")
