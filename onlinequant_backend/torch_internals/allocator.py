"""How torch's allocator gets a GPU's memory."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator

import torch

from . import parts

_ON, _OFF = "expandable_segments:True", "expandable_segments:False"
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# The free pages that a block may hold, in bytes, beyond the most that tensors have taken: to free them takes time.
_SLACK = 2**27
_lock = threading.Lock()
_running = 0  # blocks with compact memory


@contextlib.contextmanager
def compact_memory(device: torch.device) -> Iterator[Callable[[], None]]:
    """Within the block, new memory comes from segments that grow page by page ("expandable segments",
    https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf). Ordinary
    segments, with tensors of many different sizes, have gaps of up to a third. Frees unused pages at the end, since
    only such blocks could use them again. Gives a function that frees them in between if there are many. Does nothing
    if the user has made any setting of the allocator, or where there are no such segments.
    """
    is_possible = device.type == "cuda" and sys.platform == "linux" and not parts.lacks(parts.COMPACT_MEMORY)
    if not (is_possible and _begin()):
        yield _do_nothing
        return
    try:
        yield functools.partial(_trim, device)
    finally:
        _end()
        torch.cuda.empty_cache()


def _trim(device: torch.device) -> None:
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    if stats["reserved_bytes"]["all"]["current"] > stats["allocated_bytes"]["all"]["peak"] + _SLACK:
        torch.cuda.empty_cache()


def _do_nothing() -> None:
    pass


def _begin() -> bool:
    """Whether the setting is on because of this package."""
    global _running
    with _lock:
        if not _running:
            if _settings() not in ("", _OFF):
                return False
            torch._C._accelerator_setAllocatorSettings(_ON)
        _running += 1
    return True


def _settings() -> str:
    """The settings of the allocator that were made last; before torch 2.12 those that the process began with."""
    current = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    return current() if current is not None else next(filter(None, map(os.environ.get, _VARIABLES)), "")


def _end() -> None:
    global _running
    with _lock:
        _running -= 1
        if not _running:
            torch._C._accelerator_setAllocatorSettings(_OFF)
