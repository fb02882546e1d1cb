"""The record of a model's sampling runs: the graphs it ran, and the times of its steps."""

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

# Enough steps for a median that one slow step does not change.
_KEPT, _ENOUGH = 200, 4
# The kinds of steps. While a graph is compiled or loaded, steps run in float.
FLOAT, OBSERVED, QUANTIZED = "float", "calibrating", "quantized"
_TRACED = "traced"  # a step during which Dynamo traced, which takes longer than any other


@dataclasses.dataclass(frozen=True)
class Pace:
    """The time of a step.

    Attributes:
        milliseconds: the median.
        steps: the number of measured steps.
    """

    milliseconds: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A record at one moment: everything shown of a model comes from one snapshot, so that it is consistent.

    Attributes:
        reports: copies of the reports of every graph that ran in the sampling runs, including a ControlNet's.
        paces: of steps in ``FLOAT``, ``OBSERVED`` and ``QUANTIZED``, as far as measured at the last step's size.
    """

    reports: tuple[Report, ...]
    paces: dict[str, Pace]

    @property
    def gain(self) -> float | None:
        """The speedup of a quantized step over the fastest kind of float step; None before enough steps were measured,
        since the first ones of a process are slow."""
        known = {kind: pace.milliseconds for kind, pace in self.paces.items() if pace.steps >= _ENOUGH}
        floats = [known[kind] for kind in (FLOAT, OBSERVED) if kind in known]
        return min(floats) / known[QUANTIZED] if floats and QUANTIZED in known else None

    def summaries(self) -> list[str]:
        """A line for each graph, without duplicates, and the speedup."""
        lines = [*dict.fromkeys(report.summary() for report in self.reports), *self.warnings()]
        return lines if self.gain is None else [*lines, f"{self.gain:.2g}x"]

    def warnings(self) -> list[str]:
        """Warnings for the user: a large error, and patterns of ``exclude`` that match no layer in any of the
        graphs."""
        errors = [warning for report in self.reports for warning in report.warnings()]
        unmatched = [report.unmatched() for report in self.reports] or [[]]
        patterns = [pattern for pattern in unmatched[0] if all(pattern in each for each in unmatched)]
        return [*errors, *(f"exclude: no layer is called {pattern!r}" for pattern in patterns)]


class Record:
    """The record of one denoiser with one set of options, which lasts until the process exits.

    Attributes:
        reports: of every graph that ran in its sampling runs, including a ControlNet's.
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self._lock = threading.Lock()
        self._seconds: dict[tuple[Hashable, str], deque[float]] = {}
        self._size: Hashable = None  # of the last step
        self._step: _Step | None = None  # the current one
        self._asked: int | None = None  # the last value of observe_again

    @contextlib.contextmanager
    def call(self, run: SamplingRun, size: Hashable = None) -> Iterator[None]:
        """Around each call of the denoiser in a run; ``size``: of its inputs, since times depend on it. Measures the
        time between the first calls of consecutive steps: samplers read each result, so the GPU cannot lag behind, and
        no synchronization is added.
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
        """Whether ``number``, the value of the ``observe_again`` widget, differs from the last one."""
        last, self._asked = self._asked, number
        return last is not None and last != number

    def start_over(self) -> None:
        """Have the model observed again; keeps the compiled graphs, which are not used until then."""
        for report in self.reports:
            report.enter(Phase.OBSERVING, "asked to observe again")
            report.calls_observed = 0

    def snapshot(self) -> Snapshot:
        """A snapshot of the record."""
        with self._lock:
            times = {kind: self._seconds.get((self._size, kind)) for kind in (FLOAT, OBSERVED, QUANTIZED)}
            paces = {kind: Pace(1e3 * statistics.median(each), len(each)) for kind, each in times.items() if each}
            return Snapshot(tuple(report.copy() for report in self.reports), paces)

    def summaries(self) -> list[str]:
        """See ``Snapshot``."""
        return self.snapshot().summaries()

    def _add(self, step: _Step, seconds: float) -> None:
        """Add the time of a step, unless Dynamo traced or the kind of step changed during it."""
        with self._lock:
            self._size = step.size
            if len(step.kinds) == 1:
                (kind,) = step.kinds
                self._seconds.setdefault((step.size, kind), deque(maxlen=_KEPT)).append(seconds)


class _Step:
    """A step of a run, which may call the denoiser several times."""

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
    """The record of a denoiser with these options, as text; it outlives the nodes, which run again for a new LoRA."""
    return _records.setdefault(denoiser, {}).setdefault(options, Record())
