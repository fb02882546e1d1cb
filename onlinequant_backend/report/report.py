"""What was decided for every layer and why: kept in memory, printed as a table, saved as JSON."""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import json
import logging
import os
from pathlib import Path
from typing import Any

from .. import errors, exclusion, fork_locks
from ..cache.atomic_files import read_where_told, write_where_told
from ..cache.calibration_file import MAX_BYTES
from .decision import KINDS, NodeDecision
from .phases import SHOWN, TRANSITIONS, Phase
from .schema import NUMBER, OPTIONAL_NUMBER, Types, checked
from .table import render_table

_log = logging.getLogger("onlinequant")

SCHEMA_VERSION = 3
# A step's relative error from which pictures are others: that of whole models is 0.03 to 0.1.
VISIBLE = 0.2
# What is said of a layer that observing has not decided about yet.
CANDIDATE = "candidate: decided when observing is over"
PHASES = ("calibrating", "compiling", "quantized", "float")


@dataclasses.dataclass
class Report:
    """One compiled graph; the runtime keeps it up to date.

    Attributes:
        model: class name of the model that the graph was traced from.
        phase: "calibrating", "compiling", "quantized" or "float": what calls run now; ``enter`` changes it.
        phase_reason: why.
        precision: "int8", "fp8" or "float".
        precision_reason: why that precision.
        calls_observed: calls observed so far.
        calibration_steps: calls to observe in all.
        cache_hit: whether the decisions came from the cache.
        decisions: one for each convolution, linear layer and attention, in the graph's order.
        compile_seconds: seconds spent in Inductor after observing.
        error: relative error of a step in 8 bit: the first one, or with ``max_error`` one when observing was over; None
            if not measured.
        widened: by layer name, the factor by which its range has grown since observing, where larger values came; less
            than 1 where far smaller ones did.
        sensitivity_kind: what ``sensitivity`` is: "local" is of the layer's own output, the others are of the model's.
        stats_path: where the report was last saved or loaded from; None if nowhere.
        config: every option, as ``QuantConfig.to_dict()`` gives them.
        key: key of the cache entry, a hex digest.
        created: ISO 8601 time in UTC.
    """

    model: str
    phase: str = "calibrating"
    phase_reason: str = ""
    precision: str = "float"
    precision_reason: str = ""
    calls_observed: int = 0
    calibration_steps: int = 0
    cache_hit: bool = False
    decisions: list[NodeDecision] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    error: float | None = None
    widened: dict[str, float] = dataclasses.field(default_factory=dict)
    sensitivity_kind: str = "local"
    stats_path: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    key: str = ""
    created: str = dataclasses.field(default_factory=lambda: _now())
    _phase: Phase = dataclasses.field(default=Phase.OBSERVING, init=False, repr=False, compare=False)

    def enter(self, phase: Phase, reason: str) -> bool:
        """The only way to change the phase, always together with its reason. Returns False, and changes nothing, where
        ``TRANSITIONS`` does not allow it."""
        if reason is self.phase_reason and phase is self._phase:
            return True
        if phase not in TRANSITIONS[self._phase]:
            return False
        self._phase, self.phase, self.phase_reason = phase, SHOWN[phase], reason
        return True

    def enter_as(self, other: Report) -> bool:
        """Be in the phase of an earlier copy again."""
        return self.enter(other._phase, other.phase_reason)

    def is_in(self, phase: Phase) -> bool:
        """Whether this is the present phase."""
        return self._phase is phase

    def counts(self) -> dict[str, int]:
        """Layers in 8 bit (``quantized_conv``) out of those there are (``candidates_conv``); the same for linear
        layers and attention."""
        counts = {}
        for kind in KINDS:
            decisions = [decision for decision in self.decisions if decision.kind == kind]
            counts[f"quantized_{kind}"] = sum(decision.quantized for decision in decisions)
            counts[f"candidates_{kind}"] = len(decisions)
        return counts

    def standing(self, decision: NodeDecision) -> str:
        """What a layer is now: "float", "8 bit", or, while the model is in float yet, "candidate" or "chosen"."""
        if not decision.quantized or self.phase == "float":
            return "float"
        if self.phase == "quantized":
            return "8 bit"
        return "candidate" if decision.reason == CANDIDATE else "chosen"

    def headline(self) -> str:
        """How many layers of each kind are in 8 bit, or what is still to come."""
        standings = [(decision.kind, self.standing(decision)) for decision in self.decisions]
        kept = {standing for _, standing in standings} - {"float"}
        verb = {"candidate": "may go into 8 bit", "chosen": "go into 8 bit"}.get(min(kept, default=""), "in 8 bit")
        counts = [
            f"{sum(standing != 'float' for each, standing in standings if each == kind)} of "
            f"{sum(each == kind for each, _ in standings)} {kind}"
            for kind in KINDS
            if kind != "attention" or any(each == kind for each, _ in standings)
        ]
        return f"{', '.join(counts)} layers {verb}"

    def unmatched(self) -> list[str]:
        """The patterns of the option ``exclude`` that no layer's name matches."""
        return exclusion.unmatched(self.config.get("exclude", ()), [decision.name for decision in self.decisions])

    def warnings(self) -> list[str]:
        """What is wrong with the result, and what to do."""
        if self.lacks_requested_precision():
            precision = self.config["precision"]
            return [
                f"precision={precision!r} was asked for, but no layer of this graph is quantized: {self.phase_reason}"
            ]
        if self.error is None or self.error < VISIBLE or self.config.get("max_error") is not None:
            return []
        return [
            f"a step in 8 bit differs by {self.error:.2g} from float, which shows in the picture: set max_error, "
            "to 0.1 say, to keep the most sensitive layers in float"
        ]

    def lacks_requested_precision(self) -> bool:
        """Whether no layer qualifies, beside those that ``exclude`` names, although 8 bit was asked for by name."""
        if self.config.get("precision") not in ("int8", "fp8") or self.phase != "float":
            return False
        wanted = [decision for decision in self.decisions if not decision.reason.startswith("excluded by ")]
        return bool(wanted) and not any(decision.quantized for decision in wanted)

    def copy(self) -> Report:
        """The report as it is now, which stays so."""
        copied = dataclasses.replace(self, decisions=list(self.decisions), widened=dict(self.widened))
        copied._phase = self._phase
        return copied

    def summary(self) -> str:
        """One line: how many layers run in 8 bit, or why none does."""
        if self.phase == "calibrating" and self.calls_observed:
            return f"{self.model}: observed {self.calls_observed} of {self.calibration_steps} steps"
        if self.phase != "quantized":
            return f"{self.model}: {self.phase}: {self.phase_reason}"
        quantized = sum(decision.quantized for decision in self.decisions)
        return f"{self.model}: quantized: {quantized} of {len(self.decisions)} layers in {self.precision}"

    def table(self) -> str:
        """Plain text, 120 columns: a summary, one row a layer, and how often each reason for float occurs."""
        return render_table(self)

    def to_dict(self) -> dict[str, Any]:
        """What ``save`` writes: every field but ``stats_path``, and ``schema_version`` and ``counts`` with them."""
        fields = {name: getattr(self, name) for name in _REPORT_TYPES if name not in ("schema_version", "decisions")}
        decisions = [decision.to_dict() for decision in self.decisions]
        return {"schema_version": SCHEMA_VERSION, **fields, "counts": self.counts(), "decisions": decisions}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to ``path`` as JSON, atomically; raises OSError where that cannot be done, or where there is
        something else than a regular file."""
        write_where_told(Path(path), json.dumps(self.to_dict(), indent=2, default=repr) + "\n")
        self.stats_path = str(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read what ``save`` wrote; raises StatsFileError naming what is wrong with the file and what to do."""
        try:
            data = json.loads(read_where_told(Path(path), MAX_BYTES))
            version = data.get("schema_version") if isinstance(data, dict) else None
            if version != SCHEMA_VERSION:
                raise ValueError(f"its schema_version is {version!r}, and this onlinequant reads {SCHEMA_VERSION}")
            values = checked(data, _REPORT_TYPES, "the report")
            del values["schema_version"]
            checked(values["widened"], dict.fromkeys(values["widened"], NUMBER), "what was widened")
            exclude = values["config"].get("exclude", [])
            if not (isinstance(exclude, list) and all(isinstance(pattern, str) for pattern in exclude)):
                raise ValueError(f"'exclude' of its config is {exclude!r}")
            decisions = [
                NodeDecision.from_dict(decision, f"decision {index}")
                for index, decision in enumerate(values.pop("decisions"))
            ]
        except OSError as error:
            raise errors.StatsFileError(
                f"Cannot read the statistics {os.fspath(path)!r}: {error.strerror or error}. A run of a model that was "
                "compiled with backend='onlinequant' writes them; reports()[-1].stats_path says where."
            ) from error
        except (ValueError, RecursionError) as error:  # JSON may be nested as deeply as one likes
            raise errors.StatsFileError(
                f"{os.fspath(path)!r} is not a statistics file of this version: {error}. "
                "If onlinequant wrote it, delete it and run the model again to have a new one written."
            ) from error
        return cls(**values, decisions=decisions, stats_path=str(path))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw density against sensitivity, one mark a layer, into the PNG ``path``; needs matplotlib."""
        from .plot import plot_layers

        plot_layers(self, path)


class _Reports(list[Report]):
    """``reports()[-1]`` of an empty list, as before the first call of a model, says what is missing."""

    def __getitem__(self, index: Any) -> Any:
        if not self and not isinstance(index, slice):
            raise errors.NoReportError(
                "There is no report yet: a model that was compiled with backend='onlinequant' gets one in its first "
                "call."
            )
        return super().__getitem__(index)


_reports: list[Report] = []
_reports_lock = fork_locks.lock()


def register(report: Report) -> None:
    """Add ``report`` to this process's list."""
    with _reports_lock:
        _reports.append(report)


def reports() -> list[Report]:
    """One report for each graph compiled in this process, newest last."""
    with _reports_lock:
        return _Reports(_reports)


@atexit.register
def say_what_is_lost() -> None:
    """Say what was observed in vain, and what to do about it: processes that are all short would never be in 8 bit."""
    quantized = {report.model for report in reports() if report.phase == "quantized"}
    for report in reports():
        if report.phase == "calibrating" and report.calls_observed and report.model not in quantized:
            _log.warning(
                "%s: %d of %d calls were observed, which is lost as the process ends. Set calibration_steps to as many "
                "as a process makes, or sample within onlinequant_backend.sampling_run(steps), which observes a run.",
                *(report.model, report.calls_observed, report.calibration_steps),
            )


def clear() -> None:
    """Empty this process's list."""
    with _reports_lock:
        _reports.clear()


# JSON types of a saved report.
_REPORT_TYPES: Types = {
    "schema_version": int,
    "key": str,
    "created": str,
    "model": str,
    "phase": str,
    "phase_reason": str,
    "precision": str,
    "precision_reason": str,
    "calls_observed": int,
    "calibration_steps": int,
    "cache_hit": bool,
    "compile_seconds": NUMBER,
    "error": OPTIONAL_NUMBER,
    "widened": dict,
    "sensitivity_kind": str,
    "config": dict,
    "decisions": list,
}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
