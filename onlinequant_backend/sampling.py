"""What a caller that knows its sampler can say: which step of a sampling run a call of the model belongs to."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

Position = Callable[[], tuple[int, int]]
_position: contextvars.ContextVar[Position | None] = contextvars.ContextVar("onlinequant_position", default=None)


@contextlib.contextmanager
def sampling_step(position: Position) -> Iterator[None]:
    """Within the block, models are observed until the last step of a run, whatever ``calibration_steps`` says.

    ``position`` gives the number of the step, from 1, and that of all steps. It is asked only while there is something
    to observe, so it may be slow.
    """
    token = _position.set(position)
    try:
        yield
    finally:
        _position.reset(token)


def current_step(step: int, steps: int) -> tuple[int, int]:
    """The step that this call belongs to and the number of all; those given where the caller has not said."""
    position = _position.get()
    return (step, steps) if position is None else position()
