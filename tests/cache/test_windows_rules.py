"""What only Windows refuses: to rename or delete what somebody has open."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onlinequant_backend import operating_system
from onlinequant_backend.cache import atomic_files
from onlinequant_backend.cache.cache_store import Cache, emptied
from onlinequant_backend.cache.calibration_file import CALIBRATION_FILE, STATS_FILE
from onlinequant_backend.errors import InsecureCacheDirectoryError
from tests.helpers.calibrations import CALIBRATION, KEY, SIBLING, STATS, calibration, content
from tests.helpers.windows import pretend_windows


@pytest.fixture(autouse=True)
def _windows(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_windows(monkeypatch)


@contextmanager
def open_for(path: Path, seconds: float) -> Iterator[None]:
    """Within the block another thread has a file open, at most for so many seconds."""
    file = path.open("rb")
    timer = threading.Timer(seconds, file.close)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    made = Cache.open(str(tmp_path / "cache"))
    made.publish(KEY, CALIBRATION, STATS)
    return made


def test_the_rules_are_those_of_windows(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "file"
    file.write_bytes(b"1")
    with file.open("rb"):
        for forbidden in (
            file.unlink,
            lambda: file.rename(tmp_path / "other"),
            lambda: (tmp_path / "folder").rename(tmp_path / "other"),
            lambda: (tmp_path / "new").replace(file),
        ):
            with pytest.raises(PermissionError):
                forbidden()
    (tmp_path / "folder").rename(tmp_path / "other")


@pytest.mark.parametrize("name", [CALIBRATION_FILE, STATS_FILE])
def test_an_entry_that_is_being_read_is_replaced_when_the_reader_is_done(store: Cache, name: str) -> None:
    assert store.root is not None
    newer = calibration(calls=7)
    with open_for(store.root / "entries" / KEY / name, 0.2):
        store.publish(KEY, newer, STATS)
    assert content(store.load(KEY)) == content(newer)
    assert not any((store.root / "temporary").iterdir())


def test_statistics_that_are_being_read_are_replaced_when_the_reader_is_done(store: Cache) -> None:
    assert store.root is not None
    path = store.root / "entries" / KEY / STATS_FILE
    with open_for(path, 0.2):
        store.update_stats(KEY, '{"error": 0.5}')
    assert store.load_stats(KEY) == {"error": 0.5}
    assert sorted(path.parent.iterdir()) == [
        path.parent / CALIBRATION_FILE,
        path,
    ]


def test_what_stays_open_stays_as_it_is(
    store: Cache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one warning, and nothing is left behind."""
    monkeypatch.setattr(operating_system, "_PATIENCE", 0.1)
    assert store.root is not None
    path = store.root / "entries" / KEY / STATS_FILE
    with path.open("rb"):
        assert store.publish(KEY, calibration(calls=7), STATS) is None
        store.update_stats(KEY, '{"error": 0.5}')
        assert [item.path for item in store.clear()] == []
    assert caplog.text.count("being used") == 1
    assert content(store.load(KEY)) == content(CALIBRATION)
    assert sorted(file.name for file in path.parent.iterdir()) == [CALIBRATION_FILE, STATS_FILE]
    assert not any((store.root / "temporary").iterdir())
    assert [item.path for item in store.clear()] == [path.parent]


def test_a_corrupt_entry_that_is_being_read_is_moved_aside(store: Cache, caplog: pytest.LogCaptureFixture) -> None:
    assert store.root is not None
    file = store.root / "entries" / KEY / CALIBRATION_FILE
    file.write_bytes(b"damaged")
    with open_for(file, 0.2):
        assert store.load(KEY) is None
    assert "was moved aside" in caplog.text
    assert len(list((store.root / "aside").iterdir())) == 1


def test_code_that_is_loaded_stays_where_it_is(store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's libraries are open for as long as the process runs."""
    monkeypatch.setattr(operating_system, "_PATIENCE", 0.1)
    folder = store.inductor_directory(KEY)
    assert folder is not None
    (folder / "kernel.pyd").write_bytes(b"code")
    with (folder / "kernel.pyd").open("rb"):
        with pytest.raises(PermissionError), emptied(folder):
            raise AssertionError("it is not empty")
        assert (folder / "kernel.pyd").read_bytes() == b"code"
        assert Cache.open(str(store.root), 0.0).publish(SIBLING, CALIBRATION, STATS) is not None
    assert (folder / "kernel.pyd").exists()


def test_a_file_that_a_scanner_holds_is_read_when_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"1")
    free_at, opened = time.monotonic() + 0.2, atomic_files.os.open

    def held(*args: Any) -> int:
        if time.monotonic() < free_at:
            raise PermissionError(13, "Permission denied")
        return opened(*args)

    monkeypatch.setattr(atomic_files.os, "open", held)
    assert atomic_files.read_file(tmp_path / "file", 1) == b"1"


def test_elsewhere_nothing_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating_system, "is_windows", lambda: False)
    calls = []

    def refuse() -> None:
        calls.append(1)
        raise PermissionError

    with pytest.raises(PermissionError):
        operating_system.patiently(refuse)
    assert len(calls) == 1


def test_a_junction_counts_as_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what Windows has for links to folders, and it needs no privilege."""
    (tmp_path / "real").mkdir()
    (tmp_path / "junction").symlink_to(tmp_path / "real")
    info: Any = SimpleNamespace(st_mode=0o40777, st_reparse_tag=0xA0000003)
    reason = atomic_files.insecurity(tmp_path / "junction", info)
    assert reason is not None and reason.startswith("it is a link to")
    ask: Callable[..., Any] = lambda path: info  # noqa: E731
    monkeypatch.setattr(Path, "lstat", ask)
    with pytest.raises(InsecureCacheDirectoryError, match="is a link to"):
        atomic_files.check_private(tmp_path / "junction")
