"""How Triton's kernels are called: launched, or only compiled within ``ahead.on``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton

from .. import ahead


def launch(kernel: Any, *grid: int) -> Callable[..., Any]:
    """What to call with the arguments of ``kernel``, for a program at each place of ``grid``.

    Ahead, it compiles the kernel for such arguments. Of tensors their dtypes and the alignment of their addresses
    count, so that they may be on the meta device, without any memory.
    """
    return functools.partial(_compile, kernel, grid) if ahead.is_ahead() else kernel[grid]


def _compile(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    compiled = kernel.warmup(*args, grid=grid, **options)
    if compiled is not None:  # by the interpreter nothing is
        # Triton 3.6 compiles this one, too, in C; it is found in the cache when the kernel is loaded.
        triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


def processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; of the current one for the meta device, and 1 for a CPU."""
    if device.type == "cpu":
        return 1
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
