"""Failures: calls continue in float, and later runs try again."""

from __future__ import annotations

import logging
import weakref

from ..report.phases import Phase
from .announcement import announce
from .sampling import SamplingRun, current_run
from .weight_state import WeightStates

_log = logging.getLogger("onlinequant")

_MOST_FAILURES = 2


class CallersError(Exception):
    """Wraps ``error``, which the model raises in float as well, so that it is passed on to the caller."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Failures:
    """The failures of one graph.

    Attributes:
        gave_up: whether all calls run in float.
        has_failed: whether anything, perhaps for one size only, has failed that a later run may retry.
    """

    def __init__(self, states: WeightStates) -> None:
        self.gave_up = self.has_failed = False
        self._states = states
        self._report = states.traced.report
        self._count = 0
        self._failed_in: weakref.ref[SamplingRun] | None = None

    def record(self, error: Exception) -> str:
        """Log the exception being handled and return the reason for the report; the user's model still works."""
        run = current_run()
        self.has_failed = True
        self._count += 1
        self._failed_in = None if run is None else weakref.ref(run)
        _log.exception("onlinequant failed, so the model continues in float")
        self._states.unlock_entries()
        return f"it failed: {type(error).__name__}: {error}"

    def give_up(self, error: Exception) -> None:
        """Run all calls in float from now on, until ``may_retry``."""
        self.leave_in_float(self.record(error))

    def leave_in_float(self, reason: str) -> None:
        """Run all calls in float from now on."""
        self.gave_up = True
        self._report.enter(Phase.FAILED, reason)
        announce(self._report)

    def tolerates_another(self) -> bool:
        """Whether another failure to observe a call is tolerated."""
        if self._count >= _MOST_FAILURES:
            return False
        self._count += 1
        return True

    def may_retry(self, run: SamplingRun | None) -> bool:
        """Whether a new sampling run has begun since the last failure: its cause, such as a lack of memory, may be
        gone."""
        if not self.has_failed or run is None or self._count > _MOST_FAILURES:
            return False
        return self._failed_in is None or self._failed_in() is not run

    def retry(self) -> None:
        """Reset all failures, so that what failed is tried again."""
        if self.gave_up:
            self._report.enter(Phase.RETRYING, "what has failed is tried again")
        self.gave_up = self.has_failed = False
