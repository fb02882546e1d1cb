"""8-bit weights in the cache: found, counted, evicted first, and never used if damaged."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from onlinequant_backend import best_effort
from onlinequant_backend.cache import cache_store, weights_store
from onlinequant_backend.cache.cache_store import Cache
from onlinequant_backend.cache.listing import render
from onlinequant_backend.cache.weights_file import WEIGHTS_FILE, SavedWeight
from tests.helpers import cache_process
from tests.helpers.calibrations import CALIBRATION, KEY, OTHER_MACHINE, SIBLING, STATS, key
from tests.helpers.stores import root as root
from tests.helpers.stores import store as store

SIZE = 100_000
WEIGHT = SavedWeight("layer", "I8", (SIZE,), 1, "0" * 16, "1" * 16)


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "_in_use", set())
    best_effort.forget()


def save(store: Cache, of: str = KEY) -> None:
    weights_store.publish(store, of, "UNet", [WEIGHT], iter([(WEIGHT, memoryview(bytes(SIZE)), b"1234")]))


def file_of(root: Path, of: str = KEY) -> Path:
    return root / "weights" / of[:48] / WEIGHTS_FILE


def test_weights_serve_all_entries_of_a_checkpoint(root: Path, store: Cache) -> None:
    assert weights_store.load(store, KEY) is None
    save(store)
    for of in (KEY, SIBLING):
        found = weights_store.load(store, of)
        assert found is not None and bytes(found.scales["layer"]) == b"1234"
    assert weights_store.load(store, OTHER_MACHINE) is weights_store.load(store, key(weights="0")) is None
    assert [path.name for path in (root / "temporary").iterdir()] == []


def test_reading_counts_as_use(root: Path, store: Cache) -> None:
    save(store)
    os.utime(file_of(root).parent, (1.0, 1.0))
    weights_store.load(store, KEY)
    assert time.time() - file_of(root).parent.stat().st_mtime < 60


def test_weights_are_evicted_before_calibrations(root: Path, store: Cache) -> None:
    store.publish(SIBLING, CALIBRATION, STATS)
    save(store)
    os.utime(root / "entries" / SIBLING, (1.0, 1.0))
    Cache.open(str(root), size_limit=1e-4).publish(OTHER_MACHINE, CALIBRATION, STATS)
    assert not file_of(root).exists() and store.has(SIBLING) and store.has(OTHER_MACHINE)


def test_what_was_just_saved_evicts_others(root: Path) -> None:
    small = Cache.open(str(root), size_limit=1.5e-4)
    small.publish(KEY, CALIBRATION, STATS)
    for of in (OTHER_MACHINE, KEY):
        save(small, of)
    assert file_of(root).exists() and not file_of(root, OTHER_MACHINE).exists() and small.has(KEY)


def test_weights_larger_than_the_cache_are_not_saved(root: Path) -> None:
    save(Cache.open(str(root), size_limit=SIZE / 1e9))
    assert not root.exists()


def test_weights_in_use_elsewhere_are_neither_replaced_nor_removed(root: Path, store: Cache) -> None:
    save(store)
    file_of(root).write_bytes(b"")
    other = cache_process.start("hold", root)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    save(store)
    assert weights_store.load(store, KEY) is None
    assert file_of(root).read_bytes() == b""
    other.communicate()


def test_a_damaged_file_is_deleted_and_said_once(root: Path, store: Cache, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        save(store)
        file_of(root).write_bytes(file_of(root).read_bytes()[:-1])
        assert weights_store.load(store, KEY) is None
        assert not file_of(root).parent.exists()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "are not used" in record.getMessage()
    save(store)
    assert weights_store.load(store, KEY) is not None


@pytest.mark.posix
def test_a_folder_that_others_can_write_to_is_not_read(root: Path, store: Cache) -> None:
    save(store)
    file_of(root).parent.chmod(0o777)
    assert weights_store.load(store, KEY) is None


def test_a_process_without_a_cache_saves_nothing() -> None:
    nothing = Cache(None, 20)
    save(nothing)
    weights_store.discard(nothing, KEY, "")
    assert weights_store.load(nothing, KEY) is None


def test_a_failure_while_weights_are_made_leaves_nothing(root: Path, store: Cache) -> None:
    def fail() -> object:
        raise RuntimeError("changed")
        yield

    weights_store.publish(store, KEY, "UNet", [WEIGHT], fail())  # type: ignore[arg-type]
    assert not file_of(root).exists() and list((root / "temporary").iterdir()) == []


def test_the_list_shows_their_size(root: Path, store: Cache) -> None:
    for of in (KEY, SIBLING, OTHER_MACHINE):
        store.publish(of, CALIBRATION, STATS)
    assert "8-bit weights" not in render(store.entries())
    save(store)
    shown = render(store.entries())
    assert "8-bit weights" in shown and shown.count("100.") == 2 and shown.count("none") == 1
    assert {item.kind for item in store.clear()} == {"entries", "weights"}
