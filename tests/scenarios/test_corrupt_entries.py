"""An entry that is not as it was published is a miss, moved aside and logged once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from onlinequant_backend.cache import atomic_files, locks
from onlinequant_backend.cache.cache_store import Cache
from onlinequant_backend.cache.calibration_file import CALIBRATION_FILE, MAX_BYTES, STATS_FILE
from tests.helpers import cache_process
from tests.helpers.calibrations import CALIBRATION, KEY, OTHER_MACHINE, SIBLING, STATS, calibration, content, key
from tests.helpers.stores import root as root
from tests.helpers.stores import store as store


def published(store: Cache) -> Path:
    """The folder of an entry, to be corrupted."""
    stats = store.publish(KEY, CALIBRATION, STATS)
    assert stats is not None
    return stats.parent


def assert_moved_aside(root: Path, store: Cache, caplog: pytest.LogCaptureFixture, why: str) -> None:
    assert store.load(KEY) is None
    assert not os.path.lexists(root / "entries" / KEY)
    assert len(list((root / "aside").iterdir())) == 1
    assert store.load(KEY) is None
    (record,) = caplog.records
    assert "was moved aside" in record.getMessage() and why in record.getMessage()
    assert store.publish(KEY, CALIBRATION, STATS) is not None and store.load(KEY) is not None


@pytest.mark.parametrize(
    ("file", "data", "why"),
    [
        (CALIBRATION_FILE, b"", "0 bytes are no safetensors file"),
        (CALIBRATION_FILE, CALIBRATION.to_bytes(KEY)[:-1], "bytes instead of"),
        (CALIBRATION_FILE, CALIBRATION.to_bytes(SIBLING), f"belongs to the key {SIBLING}"),
        (CALIBRATION_FILE, CALIBRATION.to_bytes(KEY).replace(b'"version":"4"', b'"version":"5"'), "version is '5'"),
        (STATS_FILE, b"", "is not JSON"),
        (STATS_FILE, b"[" * 200_000, "is not JSON"),
        (STATS_FILE, b"[]", "not a JSON object"),
        (STATS_FILE, b"\xff", "is not JSON"),
    ],
    ids=range(8),
)
def test_a_corrupt_file_is_a_miss_moved_aside_and_logged_once(
    root: Path, store: Cache, caplog: pytest.LogCaptureFixture, file: str, data: bytes, why: str
) -> None:
    (published(store) / file).write_bytes(data)
    assert_moved_aside(root, store, caplog, why)


@pytest.mark.parametrize("file", [CALIBRATION_FILE, STATS_FILE])
@pytest.mark.parametrize(
    ("kind", "why"),
    [("absent", "has no"), ("link", "is a link"), ("folder", "is no regular file"), ("pipe", "is no regular file")],
)
def test_anything_but_two_files_is_corrupt(
    root: Path, store: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, kind: str, why: str
) -> None:
    path = published(store) / file
    path.rename(tmp_path / "outside")
    if kind == "link":
        path.symlink_to(tmp_path / "outside")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    assert_moved_aside(root, store, caplog, why)
    assert (tmp_path / "outside").stat().st_size > 0


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 10**12])
def test_a_huge_file_is_not_read(root: Path, store: Cache, caplog: pytest.LogCaptureFixture, size: int) -> None:
    with (published(store) / CALIBRATION_FILE).open("r+b") as file:
        file.truncate(size)  # takes no room on the disk
    assert_moved_aside(root, store, caplog, f"{size} bytes, more than")


@pytest.mark.parametrize("kind", ["file", "link", "open to others"])
def test_anything_but_a_private_folder_is_corrupt(
    root: Path, store: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    folder = published(store)
    if kind == "open to others":
        folder.chmod(0o777)
    else:
        folder.rename(tmp_path / "outside")
        folder.symlink_to(tmp_path / "outside") if kind == "link" else folder.write_text("")
    assert_moved_aside(root, store, caplog, {"file": "no directory", "link": "is a link"}.get(kind, "others may"))


def test_a_corrupt_entry_does_not_hide_the_others(root: Path, store: Cache) -> None:
    store.publish(key(graph="0"), CALIBRATION, STATS)
    atomic_files.publish_folder(root, "imported", KEY[:32], {CALIBRATION_FILE: CALIBRATION.to_bytes(KEY)})
    for damaged in (SIBLING, KEY):
        stats = store.publish(damaged, CALIBRATION, STATS)
        assert stats is not None
        stats.with_name(CALIBRATION_FILE).write_bytes(b"")
    assert content(store.load(KEY)) == content(CALIBRATION)
    assert len(list((root / "aside").iterdir())) == 2
    (root / "imported" / KEY[:32] / CALIBRATION_FILE).write_bytes(b"")
    assert store.load(OTHER_MACHINE) is None and len(list((root / "aside").iterdir())) == 3


def test_a_corrupt_entry_stays_while_another_process_has_the_lock(root: Path, store: Cache) -> None:
    folder = published(store)
    (folder / CALIBRATION_FILE).write_bytes(b"")
    holder = cache_process.start("hold", root)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert store.load(KEY) is None and folder.exists()
    holder.communicate()
    assert store.load(KEY) is None and not folder.exists()


def test_who_holds_the_lock_moves_a_corrupt_entry_aside(root: Path, store: Cache) -> None:
    folder = published(store)
    (folder / CALIBRATION_FILE).write_bytes(b"")
    with store.lock(KEY, 0) or pytest.fail("locked"):
        assert store.load(KEY) is None and not folder.exists()
        assert cache_process.output("try_lock", root) == ["locked"]  # loading did not release it


def test_an_entry_that_was_replaced_meanwhile_is_used(
    root: Path, store: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (published(store) / CALIBRATION_FILE).write_bytes(b"")
    acquire = locks.acquire

    def replace_first(path: Path, timeout: float, waiting_for: str = "") -> locks.Lock | None:
        monkeypatch.setattr(locks, "acquire", acquire)
        store.publish(KEY, CALIBRATION, STATS)
        return acquire(path, timeout, waiting_for)

    monkeypatch.setattr(locks, "acquire", replace_first)
    assert content(store.load(KEY)) == content(CALIBRATION)
    assert caplog.records == []


def test_a_calibration_that_cannot_be_is_not_published(store: Cache, caplog: pytest.LogCaptureFixture) -> None:
    assert store.publish(KEY, calibration(model="\n"), STATS) is None
    assert "the model's name" in caplog.text and not store.has(KEY)


_ORIGINAL = {CALIBRATION_FILE: CALIBRATION.to_bytes(KEY), STATS_FILE: STATS.encode()}


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` with some bytes replaced, taken away or put in, some bits flipped, or cut."""
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 8, 100])))
        how = draw(st.sampled_from(["replace", "cut", "flip", "repeat"]))
        if how == "replace":
            data = data[:start] + draw(st.binary(max_size=20)) + data[end:]
        elif how == "cut":
            data = data[:start]
        elif how == "repeat":
            data = data[:end] + data[start:]
        elif end > start:
            data = data[:start] + bytes([data[start] ^ (1 << draw(st.integers(0, 7)))]) + data[start + 1 :]
    return data


@hypothesis.given(damaged(_ORIGINAL[CALIBRATION_FILE]), damaged(_ORIGINAL[STATS_FILE]))
@hypothesis.settings(max_examples=200, deadline=None)
def test_however_an_entry_is_damaged_loading_gives_what_was_published_or_nothing(
    calibration_data: bytes, stats_data: bytes
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Cache.open(folder)
        assert store.root is not None
        place = atomic_files.make_private(store.root, "entries", KEY)
        (place / CALIBRATION_FILE).write_bytes(calibration_data)
        (place / STATS_FILE).write_bytes(stats_data)
        found = store.entries()
        assert [entry.key for entry in found] == [KEY]
        loaded = store.load(KEY)
        if calibration_data != _ORIGINAL[CALIBRATION_FILE]:
            assert loaded is None
        else:
            assert loaded is None or content(loaded) == content(CALIBRATION)
        assert (loaded is None) == (not place.exists())
        assert loaded is not None or stats_data != STATS.encode() or calibration_data != _ORIGINAL[CALIBRATION_FILE]
