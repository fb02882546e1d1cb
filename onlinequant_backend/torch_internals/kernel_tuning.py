"""How Inductor measures the configurations of its Triton kernels: one kernel at a time, and once per cache.

Inductor saves which configuration was the fastest. But it makes another one when it loads a reduction that leaves most
of a GPU idle, does not find that one again, and measures anew in each process: 5 s for FLUX.1.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..best_effort import best_effort
from . import parts

Turn = Callable[[], contextlib.AbstractContextManager[Any]]
_turns = threading.local()
_folders: set[Path] = set()


@contextlib.contextmanager
def tuned_in_turns(turn: Turn) -> Iterator[None]:
    """Within the block, Inductor autotunes each kernel in this thread within ``turn()``, one kernel at a time."""
    _take_over()
    _turns.turn = turn
    try:
        yield
    finally:
        _turns.turn = None


def remember_times(folder: Path) -> None:
    """From now on, what is measured for a kernel whose code is in ``folder`` is written beside it, and read again."""
    if torch.cuda.is_available():  # nothing else has kernels in Triton here
        _take_over()
        _folders.add(folder)


@functools.cache
def _take_over() -> None:
    if parts.lacks(parts.TUNING):
        return
    try:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    except ImportError:  # there is no Triton
        return
    kind: Any = CachingAutotuner
    measure = kind.benchmark_all_configs

    @functools.wraps(measure)
    def take_turns(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        note = _note(tuner)
        known = _read(note) if note else {}
        if known and known.keys() == {str(launcher.config) for launcher in tuner.launchers}:
            return {launcher: known[str(launcher.config)] for launcher in tuner.launchers}
        turn: Turn | None = getattr(_turns, "turn", None)
        with contextlib.nullcontext() if turn is None else turn():
            times = measure(tuner, *args, **kwargs)
        if note:
            with best_effort("cannot write %s", note):
                _write(note, {str(launcher.config): time for launcher, time in times.items()})
        return times

    kind.benchmark_all_configs = take_turns


def _note(tuner: Any) -> Path | None:
    """Where a kernel's times are written: beside its code, whose name is a digest of it and of the GPU."""
    code = getattr(tuner, "filename", None)
    if not code or not any(folder in Path(code).parents for folder in _folders):
        return None
    return Path(code).with_suffix(".times")


def _read(note: Path) -> dict[str, float]:
    """Milliseconds by configuration; none if they cannot be read."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_sound = isinstance(found, dict) and all(isinstance(time, float) for time in found.values())
    return found if is_sound else {}


def _write(note: Path, times: dict[str, float]) -> None:
    unfinished = note.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    unfinished.write_text(json.dumps(times), encoding="utf-8")
    unfinished.replace(note)
