"""Threads in tests: several that begin together, and those that work in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def at_once(*functions: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What the functions return when each runs in a thread of its own, all of them beginning together."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], torch.Tensor]) -> torch.Tensor:
        barrier.wait(60)
        with torch.no_grad():  # each thread has a mode of its own
            return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def join_background() -> None:
    """Wait until nothing is done in the background."""
    for thread in threading.enumerate():
        if thread.name == "onlinequant-background":
            thread.join(120)
            assert not thread.is_alive()
