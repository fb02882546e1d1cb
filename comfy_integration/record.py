"""What was seen of a model while it sampled: which graphs it ran, and how long its calls took."""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections import deque
from collections.abc import Iterator

from torch import nn

from onlinequant_backend import Report, SamplingRun

# Enough calls for a median that a slow one does not move.
_KEPT = 200


class Record:
    """Of one denoiser with one set of options, for as long as the process runs.

    Attributes:
        reports: of every graph that took part in its sampling runs, a ControlNet's too.
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self._seconds: dict[str, deque[float]] = {}
        self._last: tuple[SamplingRun, float, str | None] | None = None

    @contextlib.contextmanager
    def call(self, run: SamplingRun) -> Iterator[None]:
        """Around each call of the denoiser in a run.

        What is timed is from one call's beginning to the next one's: samplers look at each result, so a GPU cannot fall
        behind, and nothing waits for it on our account.
        """
        now = time.perf_counter()
        if self._last is not None and self._last[0] is run and self._last[2] is not None:
            self._seconds.setdefault(self._last[2], deque(maxlen=_KEPT)).append(now - self._last[1])
        yield
        self._last = run, now, self._phase(run)

    def milliseconds(self) -> dict[str, float]:
        """The median time of a call in each phase that was seen: "calibrating", "quantized", "float"."""
        return {phase: 1e3 * statistics.median(seconds) for phase, seconds in self._seconds.items()}

    def summaries(self) -> list[str]:
        """A line for each graph, without those that say the same."""
        return list(dict.fromkeys(report.summary() for report in self.reports))

    def _phase(self, run: SamplingRun) -> str | None:
        """The phase that all graphs were in during a call; None if they differ or if it changed, by compiling."""
        called, run.called = run.called, []
        for report, _ in called:
            if not any(report is known for known in self.reports):
                self.reports.append(report)
        phases = {phase for report, before in called for phase in (before, report.phase)}
        return phases.pop() if len(phases) == 1 else None


_records: weakref.WeakKeyDictionary[nn.Module, dict[str, Record]] = weakref.WeakKeyDictionary()


def record_of(denoiser: nn.Module, options: str) -> Record:
    """The record of a denoiser with these options, as text; it outlives the nodes, which a new LoRA makes anew."""
    return _records.setdefault(denoiser, {}).setdefault(options, Record())
