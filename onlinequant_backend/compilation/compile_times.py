"""How long compiling took on this machine, kept between runs, so that people can be told how long it will take."""

from __future__ import annotations

import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

from ..best_effort import best_effort
from ..cache.atomic_files import make_private, read_file, write_atomically

FILE = "compile_times.json"
_KEPT = 8  # of each kind; what the machine did long ago says little
_MAX_BYTES = 1_000_000
_MAX_KINDS = 64
_MAX_SECONDS = 86400.0  # for one node, which no machine takes: a number that somebody has made up


class CompileTimes:
    """Seconds for each node of a graph, by kind of compile: what differs in kind takes different times.

    ``root``: the cache directory; None, or one in which nothing can be written, remembers nothing. What other processes
    write at the same time may be lost, which costs no more than precision.
    """

    def __init__(self, root: Path | None) -> None:
        self._path = None if root is None else root / FILE

    def expected(self, kind: str, nodes: int) -> float | None:
        """Seconds that a graph of so many ``nodes`` will take; None if there was none of this ``kind`` yet."""
        known = self._load().get(kind)
        return statistics.median(known) * nodes if known else None

    def add(self, kind: str, nodes: int, seconds: float) -> None:
        """Remember a compile that is over."""
        if self._path is None or not nodes:
            return
        times = self._load()
        times[kind] = [*times.pop(kind, [])[1 - _KEPT :], seconds / nodes]
        latest = dict(list(times.items())[-_MAX_KINDS:])
        with best_effort("cannot write %s", self._path):
            make_private(self._path.parent)
            write_atomically(self._path, json.dumps(latest, indent=1) + "\n")

    def _load(self) -> dict[str, list[float]]:
        """Empty where there is no file, or none that can be read: the next compile writes another."""
        if self._path is None:
            return {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found: Any = json.loads(read_file(self._path, _MAX_BYTES))
            if isinstance(found, dict):
                return {kind: times for kind, times in found.items() if _are_times(times)}
        return {}


def _are_times(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is float and 0 <= value <= _MAX_SECONDS for value in values)
