"""The times of compiles on this machine, kept between runs, from which progress bars estimate the next one's."""

from __future__ import annotations

import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

from ..best_effort import best_effort
from ..cache.atomic_files import make_private, read_file, write_atomically

FILE = "compile_times.json"
_KEPT = 8  # of each kind; old times say little
_MAX_BYTES = 1_000_000
_MAX_KINDS = 64
_MAX_SECONDS = 86400.0  # for one node; no machine takes that long, so the file was edited


class CompileTimes:
    """Seconds per node of a graph, by kind of compile, since kinds take different times. ``root``: the cache directory;
    with None, or one that is not writable, nothing is kept. Times that other processes write at the same time may be
    lost, which only costs precision.
    """

    def __init__(self, root: Path | None) -> None:
        self._path = None if root is None else root / FILE

    def expected(self, kind: str, nodes: int) -> float | None:
        """The expected seconds for a graph of this many ``nodes``; None if there is no time of this ``kind`` yet."""
        known = self._load().get(kind)
        return statistics.median(known) * nodes if known else None

    def add(self, kind: str, nodes: int, seconds: float) -> None:
        """Add the time of a finished compile."""
        if self._path is None or not nodes:
            return
        times = self._load()
        times[kind] = [*times.pop(kind, [])[1 - _KEPT :], seconds / nodes]
        latest = dict(list(times.items())[-_MAX_KINDS:])
        with best_effort("cannot write %s", self._path):
            make_private(self._path.parent)
            write_atomically(self._path, json.dumps(latest, indent=1) + "\n")

    def _load(self) -> dict[str, list[float]]:
        """The times in the file; empty if it does not exist or is not readable: the next compile writes a new one."""
        if self._path is None:
            return {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found: Any = json.loads(read_file(self._path, _MAX_BYTES))
            if isinstance(found, dict):
                return {kind: times for kind, times in found.items() if _are_times(times)}
        return {}


def _are_times(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is float and 0 <= value <= _MAX_SECONDS for value in values)
