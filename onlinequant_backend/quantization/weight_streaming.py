"""Copies weights from the host to the GPU just before a float graph reads them, and the next ones meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch

from .host_weights import is_on_host, on_device


class _Ahead(threading.local):
    """The copies that this thread has begun, by the ``id`` of the weight, each with the event of its end; None on a
    CPU."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[torch.Tensor, torch.cuda.Event | None]] = {}


_ahead = _Ahead()
_streams: dict[torch.device, torch.cuda.Stream] = {}


def stream_first(weight: torch.Tensor, *upcoming: torch.Tensor) -> torch.Tensor:
    """``stream`` for the first weight of a graph: what an earlier call that failed has left may be out of date."""
    _drop_copies()
    return stream(weight, *upcoming)


def stream(weight: torch.Tensor, *upcoming: torch.Tensor) -> torch.Tensor:
    """``weight`` for the operation that follows: itself, or a copy in the GPU's memory if it is on the host. Begins to
    copy the ``upcoming`` ones, in the order in which they are read. The node that ``passes.stream_weights`` inserts.
    """
    copy, done = _ahead.copies.pop(id(weight), (None, None))
    if copy is not None:
        _wait(copy, done)
    # Each once: a copy that nobody waits for would be written to after its memory is used for something else.
    missing = {id(other): other for other in upcoming if id(other) not in _ahead.copies}
    wanted = [other for other in missing.values() if is_on_host(other) and not _is_trained(other)]
    if wanted:
        _begin(wanted)
    if copy is not None:
        return copy
    return weight if _is_trained(weight) else on_device(weight)


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """A block in which a graph reads weights through ``stream``. If it fails, copies that nobody read are freed."""
    try:
        yield
    except BaseException:
        _drop_copies()
        raise


def _drop_copies() -> None:
    for copy, done in _ahead.copies.values():
        _wait(copy, done)  # before its memory is used for something else
    _ahead.copies.clear()


def _is_trained(weight: torch.Tensor) -> bool:
    # A copy has no gradient.
    return weight.requires_grad and torch.is_grad_enabled()


def _begin(weights: Sequence[torch.Tensor]) -> None:
    """Begin to copy weights. The copies belong to the current stream, in whose order their memory is used again, while
    the host is many layers ahead. So the other stream must not write to it before the current one has got here."""
    device = weights[0].device
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        _ahead.copies.update((id(weight), (on_device(weight), None)) for weight in weights)
        return
    copies = [torch.empty_like(weight, dtype=weight.dtype, device=device) for weight in weights]
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    side = _streams[device]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side), torch.no_grad():
        for weight, copy in zip(weights, copies, strict=True):
            copy.copy_(weight, non_blocking=True)
            _ahead.copies[id(weight)] = copy, side.record_event()


def _wait(copy: torch.Tensor, done: torch.cuda.Event | None) -> None:
    if done is not None:
        torch.cuda.current_stream(copy.device).wait_event(done)
