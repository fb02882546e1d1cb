"""Copies weights from the host to the GPU just before a float graph reads them, and the next ones meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from .host_weights import is_on_host, on_device


class _Ahead(threading.local):
    """The copies that this thread has begun, by the ``id`` of the weight, each with what waits for it."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[torch.Tensor, Callable[[], None]]] = {}


_ahead = _Ahead()
_streams: dict[torch.device, torch.cuda.Stream] = {}


def stream_first(weight: torch.Tensor, *upcoming: torch.Tensor) -> torch.Tensor:
    """``stream`` for the first weight of a graph: what an earlier call that failed has left may be out of date."""
    _ahead.copies.clear()
    return stream(weight, *upcoming)


def stream(weight: torch.Tensor, *upcoming: torch.Tensor) -> torch.Tensor:
    """``weight`` for the operation that follows: itself, or a copy in the GPU's memory if it is on the host. Begins to
    copy the ``upcoming`` ones, in the order in which they are read. The node that ``passes.stream_weights`` inserts.
    """
    found = _copied(weight)
    for other in upcoming:
        if is_on_host(other) and not _is_trained(other):
            _ahead.copies[id(other)] = _begin(other)
    return found


def _copied(weight: torch.Tensor) -> torch.Tensor:
    copy, wait = _ahead.copies.pop(id(weight), (None, None))
    if copy is not None and wait is not None:
        wait()
        return copy
    return weight if _is_trained(weight) else on_device(weight)


def _is_trained(weight: torch.Tensor) -> bool:
    # A copy has no gradient.
    return weight.requires_grad and torch.is_grad_enabled()


def _begin(weight: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    if weight.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return on_device(weight), lambda: None
    device = weight.device
    side = _streams.setdefault(device, torch.cuda.Stream(device))
    with torch.cuda.stream(side):
        copy = on_device(weight)
        done = side.record_event()

    def wait() -> None:
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        copy.record_stream(current)

    return copy, wait
