"""How torch's allocator gets a GPU's memory."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..operating_system import is_linux
from ..tensors import numbered
from . import parts

_log = logging.getLogger("onlinequant")

_ON, _OFF = "expandable_segments:True", "expandable_segments:False"
# The free pages that a block may hold, in bytes and as a share of the most that tensors have taken: to free them and to
# get them again takes time.
_SLACK, _SHARE = 2**27, 1 / 16
_LARGE = 2**25  # bytes of a tensor beside which a look takes no time
_lock = threading.Lock()
_running = 0  # blocks with compact memory
_made = ""  # the settings as this package has left them


@contextlib.contextmanager
def compact_memory(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Within the block, new memory comes from segments that grow page by page ("expandable segments",
    https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf). Ordinary
    segments, with tensors of many different sizes, have gaps of up to a third. Frees unused pages at the end, since
    only such blocks could use them again. Gives a function that frees them in between if there are many; its argument
    is the bytes of the tensor that was made last. Does nothing if the user has made any setting of the allocator, or
    where there are no such segments.
    """
    if not (_is_possible(device) and _begin()):
        yield _do_nothing
        return
    try:
        yield _Trim(device)
    finally:
        _end()
        torch.cuda.empty_cache()


class _Trim:
    """Frees unused pages if there are many, which otherwise are no use to a tensor that is larger than each gap between
    others. Looks when a tensor is large: a look takes as long as to launch some kernels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept = 0  # what is free even so, since a page is free only as a whole

    def __call__(self, made: int) -> None:
        if made < _LARGE:
            return
        free, most = self._sizes()
        if free > self._kept + max(_SLACK, _SHARE * most):
            torch.cuda.empty_cache()
            self._kept, _ = self._sizes()

    def _sizes(self) -> tuple[int, int]:
        """What is reserved now and in no tensor, and the most that tensors have taken."""
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        allocated = stats["allocated_bytes"]["all"]
        return stats["reserved_bytes"]["all"]["current"] - allocated["current"], allocated["peak"]


def _do_nothing(made: int) -> None:
    pass


def _is_possible(device: torch.device) -> bool:
    if device.type != "cuda" or not is_linux() or parts.lacks(parts.COMPACT_MEMORY):
        return False
    # Other allocators have no such segments, and not all of them count what they take.
    return torch.cuda.get_allocator_backend() == "native" and _settings() == _made and _works(numbered(device))


def _settings() -> str | None:
    """The settings of the allocator that were made last; None if they cannot be asked for."""
    current = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if current is not None:
        return str(current())
    found: dict[str, Any] = torch.cuda.memory._snapshot().get("allocator_settings", {})  # before torch 2.12
    return found.get("PYTORCH_CUDA_ALLOC_CONF")


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether the driver has such segments: those of some virtual machines have none."""
    if not _begin():
        return False
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)):  # no memory is cached for it
            torch.empty(2**22, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        _log.info("memory has gaps, since there are no expandable segments here: %s", error)
        return False
    finally:
        _end()
    return True


def _begin() -> bool:
    """Whether the setting is on because of this package."""
    global _running
    with _lock:
        if not _running:
            if _settings() != _made:
                return False
            _set(_ON)
        _running += 1
    return True


def _end() -> None:
    global _running
    with _lock:
        _running -= 1
        if not _running:
            _set(_OFF)


def _set(settings: str) -> None:
    global _made
    torch._C._accelerator_setAllocatorSettings(settings)
    _made = settings
