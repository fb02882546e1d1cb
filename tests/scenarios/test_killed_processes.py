"""Processes that die while they publish, or publish at the same time: no half entry is ever seen."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from onlinequant_backend.cache import atomic_files
from onlinequant_backend.cache.cache_store import Cache
from tests.helpers import cache_process
from tests.helpers.calibrations import CALIBRATION, KEY, STATS, calibration, content


def published(root: Path) -> Cache:
    store = Cache.open(str(root))
    assert store.publish(KEY, CALIBRATION, STATS) is not None
    return store


@pytest.mark.parametrize("before", ["nothing", "an older entry"])
def test_a_process_killed_at_any_step_leaves_a_whole_entry_or_none_and_no_lock(tmp_path: Path, before: str) -> None:
    def prepared(name: str) -> Path:
        root = tmp_path / name
        if before == "an older entry":
            published(root)
            imported = {"calibration.safetensors": CALIBRATION.to_bytes(KEY)}
            atomic_files.publish_folder(root, "imported", KEY[:32], imported)
        return root

    steps = cache_process.output("name_steps", prepared("named"))
    for point in ("before writing", "while writing", "after writing"):
        for file in ("calibration.safetensors", "quantization_stats.json"):
            assert f"{point} {file}" in steps
    assert {"before renaming", "after renaming"} < set(steps)
    assert ("after moving the old away" in steps) == (before != "nothing")
    killed = [cache_process.start("die_at_step", prepared(str(number)), number) for number in range(len(steps))]
    for process in killed:
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    outcomes = [after_the_kill(tmp_path / str(number)) for number in range(len(steps))]
    old = [20] if before == "an older entry" else []
    assert {found for pair in outcomes for found in pair} <= {None, *old, 21, 22}
    assert outcomes[0] == ((20, 20) if old else (None, None))
    assert outcomes[-1] == (21, 22)


def after_the_kill(root: Path) -> tuple[int | None, int | None]:
    """How many calls the entry and the imported calibration have; the next process goes on as if nothing was."""
    store = Cache.open(str(root))
    lock = store.lock(KEY, 0)
    assert lock is not None
    found = []
    for kind in ("entries", "imported"):
        other = "imported" if kind == "entries" else "entries"
        hidden = (root / other).rename(root / "hidden") if (root / other).exists() else None
        loaded = store.load(KEY)
        found.append(None if loaded is None else loaded.calls)
        if hidden is not None:
            hidden.rename(root / other)
    assert not (root / "aside").exists()
    for path in (root / "temporary").iterdir():  # an hour later
        os.utime(path, (time.time() - 4000,) * 2)
    assert store.publish(KEY, calibration(calls=23), STATS) is not None
    assert content(store.load(KEY)) == content(calibration(calls=23))
    assert list((root / "temporary").iterdir()) == list((root / "trash").iterdir()) == []
    lock.release()
    return found[0], found[1]


def test_processes_that_publish_and_load_at_once_see_whole_entries_only(tmp_path: Path) -> None:
    published(tmp_path)
    processes = [cache_process.start("publish_and_load", tmp_path, 50) for _ in range(3)]
    for process in processes:
        outcomes, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        # A miss is possible, between the two renames of another process; trouble is not.
        assert set(outcomes.split()) <= {"published", "hit", "miss"}
    assert not (tmp_path / "aside").exists()
    assert Cache.open(str(tmp_path)).load(KEY) is not None
