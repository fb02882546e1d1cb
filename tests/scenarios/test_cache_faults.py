"""What the cache does when the disk fails: it warns once, and the model goes on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onlinequant_backend.cache import atomic_files, cache_store
from onlinequant_backend.cache.cache_store import Cache
from tests.helpers.calibrations import CALIBRATION, KEY, SIBLING, STATS, calibration, content, key


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "_in_use", set())


def use(store: Cache) -> list[object]:
    """Everything that a run does with the cache, three times over."""
    results: list[object] = []
    for _ in range(3):
        lock = store.lock(KEY, 0)
        results += [store.load(KEY), store.has(KEY), store.inductor_directory(KEY)]
        results += [store.publish(KEY, CALIBRATION, STATS), store.entries(), store.clear(max_size_gb=0)]
        if lock is not None:
            lock.release()
    return results


def published(root: Path) -> Cache:
    store = Cache.open(str(root))
    assert store.publish(KEY, CALIBRATION, STATS) is not None
    return store


def assert_warned_once(caplog: pytest.LogCaptureFixture, why: str) -> None:
    (message,) = [record.getMessage() for record in caplog.records]
    assert why in message


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a directory read-only, for root as well, whom permissions do not stop."""

    def protect(root: Path) -> None:
        def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(path: Any, *arguments: Any, **options: Any) -> Any:
                writes = function is not os_open or arguments[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if writes and str(path).startswith(str(root)) and not (function is mkdir and Path(path).exists()):
                    raise OSError(errno.EROFS, "Read-only file system", str(path))
                return function(path, *arguments, **options)

            return wrapped

        mkdir, os_open = os.mkdir, os.open
        for name in ("mkdir", "open", "rename", "replace", "unlink", "rmdir", "utime"):
            monkeypatch.setattr(os, name, refusing(getattr(os, name)))
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))

    return protect


def test_a_read_only_directory_is_read(
    tmp_path: Path, read_only: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    store = published(tmp_path)
    folder = store.inductor_directory(KEY)
    read_only(tmp_path)
    for _ in range(2):
        assert content(store.load(KEY)) == content(CALIBRATION)
        assert store.inductor_directory(KEY) is None
        assert store.lock(KEY, 0) is None
        assert store.publish(KEY, CALIBRATION, STATS) is None
        assert store.clear() == [] and len(store.entries()) == 1
    assert folder is not None and folder.exists()
    assert_warned_once(caplog, "Read-only file system")


def test_a_corrupt_entry_of_a_read_only_directory_is_a_miss(
    tmp_path: Path, read_only: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    store = published(tmp_path)
    (tmp_path / "entries" / KEY / "calibration.safetensors").write_bytes(b"")
    store.publish(SIBLING, CALIBRATION, STATS)
    read_only(tmp_path)
    for _ in range(2):
        assert content(store.load(KEY)) == content(CALIBRATION)  # the sibling's
        assert store.load(key(graph="0")) is not None
    (tmp_path / "entries" / SIBLING / "calibration.safetensors").write_bytes(b"")
    assert store.load(KEY) is None
    assert_warned_once(caplog, "a corrupt entry of the cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not stop root")
def test_a_directory_without_permissions_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = published(tmp_path / "root")
    folders = [path for path in (tmp_path / "root", *(tmp_path / "root").rglob("*")) if path.is_dir()]
    for mode, readable in ((0o500, True), (0, False)):
        for folder in reversed(folders):
            folder.chmod(mode)
        loaded, results = store.load(KEY), use(Cache.open(str(tmp_path / "root")))
        for folder in folders:
            folder.chmod(0o700)
        assert (loaded is not None) == readable
        assert any(results) == readable
        assert store.publish(KEY, CALIBRATION, STATS) is not None
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # when writing, and when opening
    assert all("Permission denied" in message for message in messages)


def test_a_full_disk_keeps_the_older_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = published(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", full)
    for _ in range(2):
        assert store.publish(KEY, calibration(calls=1), STATS) is None
    assert content(store.load(KEY)) == content(CALIBRATION)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert_warned_once(caplog, "No space left on device")


def test_a_disk_that_is_full_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: object, mode: int = 0o777, **_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(os, "mkdir", full)
    assert not any(use(Cache.open(str(tmp_path / "root"))))
    assert_warned_once(caplog, "No space left on device")


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_disk_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    store = published(tmp_path)
    os_open = os.open

    def fail(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".safetensors"):
            raise OSError(code, os.strerror(code), str(path))
        return os_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    assert store.load(KEY) is None is store.load(KEY)
    assert (tmp_path / "entries" / KEY).exists()  # it may be whole
    assert_warned_once(caplog, os.strerror(code))


def test_without_a_home_directory_there_is_no_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def no_such_user(_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", no_such_user)
    for name in (*cache_store.ENVIRONMENT_VARIABLES, "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for configured in (None, "~/cache"):
        store = Cache.open(configured)
        assert store.root is None
        assert not any(use(store))
    assert_warned_once(caplog, "let ONLINEQUANT_CACHE_DIR name a directory")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_home_directory_is_not_one_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("ONLINEQUANT_CACHE_DIR")
    monkeypatch.setattr(cache_store.platformdirs, "user_cache_path", lambda name: Path("~/.cache") / name)
    assert Cache.open(None).root is None
    assert_warned_once(caplog, "no home directory is known")


@pytest.mark.parametrize("configured", ["bad\0name", "loop/cache", "x" * 5000])
def test_a_path_that_cannot_be_is_no_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, configured: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert not any(use(Cache.open(configured)))
    assert_warned_once(caplog, "there is no cache directory")


@pytest.mark.parametrize("below", [".", "below"])
def test_a_file_is_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture, below: str) -> None:
    (tmp_path / "file").write_text("kept")
    assert not any(use(Cache.open(str(tmp_path / "file" / below))))
    assert_warned_once(caplog, "there is no cache directory")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_directory_that_is_deleted_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "root"
    store = published(root)
    lock = store.lock(KEY, 0)
    folder = store.inductor_directory(KEY)
    assert lock is not None and folder is not None
    shutil.rmtree(root)
    assert store.load(KEY) is None and store.entries() == [] == store.clear()
    assert store.inductor_directory(KEY) == folder and folder.is_dir()
    assert store.publish(KEY, CALIBRATION, STATS) is not None and store.load(KEY) is not None
    lock.release()
    assert caplog.records == []
    assert (root.stat().st_mode & 0o777) == 0o700


@pytest.mark.parametrize("name", ["mkdir", "rename", "lstat", "read_bytes"])
def test_whatever_fails_nothing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    store = published(tmp_path)
    monkeypatch.setattr(Path, name, lambda *_, **__: fail())
    use(store)


@pytest.mark.parametrize("name", ["fsync", "open", "utime", "listdir", "scandir", "fdopen", "fstat", "access"])
@pytest.mark.parametrize("error", [OSError("the disk is gone"), RuntimeError("unforeseen"), MemoryError()])
def test_whatever_fails_in_the_system_nothing_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    store = published(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, lambda *_, **__: fail(error))
        use(store)


def fail(error: Exception | None = None) -> Any:
    raise error or OSError("the disk is gone")
