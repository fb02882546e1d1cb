"""Sampling runs: a caller that knows its sampler marks where a run begins and ends, and the current step."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING

from ..errors import InvalidOptionError

if TYPE_CHECKING:
    from ..report.report import Report

_current: contextvars.ContextVar[SamplingRun | None] = contextvars.ContextVar("onlinequant_run", default=None)


class SamplingRun:
    """One sampling run of a model and of other models, such as a ControlNet, that are called in it.

    Attributes:
        steps: their number.
        step: the current one, from 1; set by the caller.
        is_observed: observe all calls of this run and compile at its end, whatever ``calibration_steps`` says.
        called: the report of each graph that was called, and its phase when the call began.
    """

    def __init__(self, steps: int, is_observed: bool = True) -> None:
        self.steps = max(_count(steps), 1)
        self.step = 1
        self.is_observed = is_observed
        self.called: list[tuple[Report, str]] = []
        self._at_end: dict[Hashable, Callable[[], None]] = {}

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Within the block, all calls in this thread belong to this run."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def at_end(self, key: Hashable, function: Callable[[], None]) -> None:
        """Register ``function``, one per ``key``, for the end of the run; it reports to the current listener."""
        self._at_end[key] = functools.partial(contextvars.copy_context().run, function)

    def end(self) -> None:
        """End the run: its observations are used. Must not be called for an interrupted run; then the next run observes
        again."""
        waiting, self._at_end = self._at_end, {}
        for function in waiting.values():
            function()


def _count(steps: object) -> int:
    try:
        return operator.index(steps)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidOptionError(f"steps is {steps!r}, but it counts the sampler's steps: give an integer.") from None


@contextlib.contextmanager
def sampling_run(steps: int) -> Iterator[SamplingRun]:
    """Within the block, models that have not been observed yet are observed for all of its calls, and compiled at its
    end, whatever ``calibration_steps`` says. An exception interrupts the run.

    ``steps`` and ``SamplingRun.step`` only show progress. Later runs separate the calls of one image from those of the
    next: see ``drift.Schedule``.
    """
    run = SamplingRun(steps)
    with run.current():
        yield run
        run.end()


def current_run() -> SamplingRun | None:
    """The run that a call in this thread belongs to."""
    return _current.get()
