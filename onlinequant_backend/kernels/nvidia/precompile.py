"""Compiles a GPU's kernels several at a time, before they are needed: Triton compiles each at its first call, which
takes a second, one after the other."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pkgutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("onlinequant")
# Most of a compile is done outside of Python, by LLVM and ptxas.
THREADS = min(8, os.cpu_count() or 1)
# Tensors of this device have no memory, and nothing runs on it.
NOWHERE = torch.device("meta")

# What first calls import. Threads that do so at the same time may each wait for a module that the other one has begun
# to import, which Python ends with an error.
_IMPORTED_BY_CALLS = (
    "triton.experimental.gluon.language.nvidia.hopper",
    "triton.experimental.gluon.nvidia.hopper",
    *(f"{__package__}.{module.name}" for module in pkgutil.iter_modules([str(Path(__file__).parent)])),
)

_local = threading.local()


class _Calls:
    """First calls of kernels that other threads make, each once."""

    def __init__(self, device: torch.device, pool: ThreadPoolExecutor) -> None:
        self._device = device
        self._pool = pool
        self._known: set[tuple[Any, ...]] = set()

    def add(self, kernel: Callable[..., Any], args: tuple[Any, ...]) -> None:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if any(arg.device.type != self._device.type for arg in tensors):
            return
        key = (kernel, *(_like(arg) if isinstance(arg, torch.Tensor) else str(arg) for arg in args))
        if key not in self._known:
            self._known.add(key)
            self._pool.submit(self._run, kernel, args)

    def _run(self, kernel: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            with on(self._device):
                kernel(*(self._made(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
        except Exception as error:  # it will tell when it is called for good
            _log.debug("a kernel cannot be compiled ahead: %s", error)

    def _made(self, like: torch.Tensor) -> torch.Tensor:
        # Where it starts in its storage decides whether its address is aligned.
        last = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        storage = torch.empty(like.storage_offset() + max(last, 0) + 1, dtype=like.dtype, device=NOWHERE)
        return storage.as_strided(like.shape, like.stride(), like.storage_offset())


def threads() -> ThreadPoolExecutor:
    """Threads that call kernels within ``on``."""
    for name in _IMPORTED_BY_CALLS:
        with contextlib.suppress(ImportError):  # not every Triton has all of it
            importlib.import_module(name)
    return ThreadPoolExecutor(THREADS)


@contextlib.contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """Within the block, this thread's fake calls of ``noted`` operators have other threads call the kernels, with
    tensors of the same kind. It ends when these have done so."""
    if device.type != "cuda":
        yield
        return
    with threads() as pool:
        _local.calls = _Calls(device, pool)
        try:
            yield
        finally:
            _local.calls = None


def noted(fake: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``fake``, which takes part in ``compiling_ahead``, of an operator that ``kernel`` is for GPUs."""

    @functools.wraps(fake)
    def run(*args: Any) -> Any:
        calls = getattr(_local, "calls", None)
        if calls is not None and not any(_is_symbolic(arg) for arg in args):
            calls.add(kernel, args)
        return fake(*args)

    return run


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """What a thread needs to call kernels ahead, with tensors that are ``NOWHERE``, for a GPU: see ``launch``."""
    _local.is_ahead = True
    try:
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        _local.is_ahead = False


def is_ahead() -> bool:
    """Whether this thread calls kernels only to have them compiled, within ``on``."""
    return getattr(_local, "is_ahead", False)


def _is_symbolic(arg: Any) -> bool:
    if not isinstance(arg, torch.Tensor):
        return False
    return any(isinstance(size, torch.SymInt) for size in (*arg.shape, *arg.stride(), arg.storage_offset()))


def _like(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype
