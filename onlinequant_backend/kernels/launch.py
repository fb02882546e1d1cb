"""How Triton's kernels are called: launched, or only compiled within ``ahead.on``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import ahead


def launch(kernel: Any, *grid: int) -> Callable[..., Any]:
    """What to call with the arguments of ``kernel``, for a program at each place of ``grid``.

    Ahead, it compiles the kernel for such arguments. Of tensors their dtypes and the alignment of their addresses
    count, so that they may be on the meta device, without any memory.
    """
    return functools.partial(kernel.warmup, grid=grid) if ahead.is_ahead() else kernel[grid]


def processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; of the current one for the meta device, and 1 for a CPU."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device if device.type == "cuda" else None).multi_processor_count
