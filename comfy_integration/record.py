"""What was seen of a model while it sampled: which graphs it ran, and how long its steps took."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import threading
import time
import weakref
from collections import deque
from collections.abc import Hashable, Iterator

from torch import nn

from onlinequant_backend import Report, SamplingRun
from onlinequant_backend.report.phases import Phase

# Enough steps for a median that a slow one does not move.
_KEPT, _ENOUGH = 200, 4
# What steps are told apart by. While a graph is compiled or loaded, it runs in float.
FLOAT, OBSERVED, QUANTIZED = "float", "calibrating", "quantized"
_TRACED = "traced"  # a step in which Dynamo did, which takes longer than any other


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a step takes.

    Attributes:
        milliseconds: the median.
        steps: how many there were.
    """

    milliseconds: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A record as it was at one moment: whatever is said of a model is made of one, so that nothing contradicts.

    Attributes:
        reports: copies, of every graph that took part in the sampling runs, a ControlNet's too.
        paces: of steps in ``FLOAT``, ``OBSERVED`` and ``QUANTIZED``, as far as they were seen at the last step's size.
    """

    reports: tuple[Report, ...]
    paces: dict[str, Pace]

    @property
    def gain(self) -> float | None:
        """How many times faster a step in 8 bit is than the fastest kind of step in float; None before enough are seen,
        for the first ones of a process are slow."""
        known = {kind: pace.milliseconds for kind, pace in self.paces.items() if pace.steps >= _ENOUGH}
        floats = [known[kind] for kind in (FLOAT, OBSERVED) if kind in known]
        return min(floats) / known[QUANTIZED] if floats and QUANTIZED in known else None

    def summaries(self) -> list[str]:
        """A line for each graph, without those that say the same, and what is gained."""
        lines = [*dict.fromkeys(report.summary() for report in self.reports), *self.warnings()]
        return lines if self.gain is None else [*lines, f"{self.gain:.2g}x"]

    def warnings(self) -> list[str]:
        """What the user should know of: a large error, and patterns of ``exclude`` that match in none of the graphs."""
        errors = [warning for report in self.reports for warning in report.warnings()]
        unmatched = [report.unmatched() for report in self.reports] or [[]]
        patterns = [pattern for pattern in unmatched[0] if all(pattern in each for each in unmatched)]
        return [*errors, *(f"exclude: no layer is called {pattern!r}" for pattern in patterns)]


class Record:
    """Of one denoiser with one set of options, for as long as the process runs.

    Attributes:
        reports: of every graph that took part in its sampling runs, a ControlNet's too.
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self._lock = threading.Lock()
        self._seconds: dict[tuple[Hashable, str], deque[float]] = {}
        self._size: Hashable = None  # of the last step
        self._step: _Step | None = None  # the one that is going on
        self._asked: int | None = None  # how often to observe again

    @contextlib.contextmanager
    def call(self, run: SamplingRun, size: Hashable = None) -> Iterator[None]:
        """Around each call of the denoiser in a run; ``size``: of what it is given, for other sizes take other times.

        What is timed is from one step's first call to that of the next: samplers look at each result, so a GPU cannot
        fall behind, and nothing waits for it on our account.
        """
        now, step = time.perf_counter(), self._step
        if step is None or not step.is_now(run):
            if step is not None and step.run() is run and run.step == step.number + 1:
                self._add(step, now - step.begun)
            step = self._step = _Step(run, now, size)
        yield
        called, run.called = run.called, []
        step.kinds |= {_kind(phase) for report, before in called for phase in (before, report.phase)}
        with self._lock:
            for report, _ in called:
                if not any(report is known for known in self.reports):
                    self.reports.append(report)
                    step.kinds.add(_TRACED)

    def is_to_observe_again(self, number: int) -> bool:
        """Whether this number, of times that the user has asked for it, is another than the last one."""
        last, self._asked = self._asked, number
        return last is not None and last != number

    def start_over(self) -> None:
        """What was compiled stays, and is not used until the model was observed again."""
        for report in self.reports:
            report.enter(Phase.OBSERVING, "asked to observe again")
            report.calls_observed = 0

    def snapshot(self) -> Snapshot:
        """What was seen until now."""
        with self._lock:
            times = {kind: self._seconds.get((self._size, kind)) for kind in (FLOAT, OBSERVED, QUANTIZED)}
            paces = {kind: Pace(1e3 * statistics.median(each), len(each)) for kind, each in times.items() if each}
            return Snapshot(tuple(report.copy() for report in self.reports), paces)

    def summaries(self) -> list[str]:
        """See ``Snapshot``."""
        return self.snapshot().summaries()

    def _add(self, step: _Step, seconds: float) -> None:
        """A step during which it was traced, or changed over, does not count."""
        with self._lock:
            self._size = step.size
            if len(step.kinds) == 1:
                (kind,) = step.kinds
                self._seconds.setdefault((step.size, kind), deque(maxlen=_KEPT)).append(seconds)


class _Step:
    """A step of a run, whose calls of the denoiser may be several."""

    def __init__(self, run: SamplingRun, begun: float, size: Hashable) -> None:
        self.run = weakref.ref(run)
        self.number = run.step
        self.begun = begun
        self.size = size
        self.kinds: set[str] = set()

    def is_now(self, run: SamplingRun) -> bool:
        return self.run() is run and self.number == run.step


def _kind(phase: str) -> str:
    return phase if phase in (OBSERVED, QUANTIZED) else FLOAT


_records: weakref.WeakKeyDictionary[nn.Module, dict[str, Record]] = weakref.WeakKeyDictionary()


def record_of(denoiser: nn.Module, options: str) -> Record:
    """The record of a denoiser with these options, as text; it outlives the nodes, which a new LoRA makes anew."""
    return _records.setdefault(denoiser, {}).setdefault(options, Record())
