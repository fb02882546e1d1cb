from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onlinequant_backend.cache import atomic_files
from onlinequant_backend.cache.cache_store import Cache
from onlinequant_backend.cache.calibration_file import InvalidEntryError
from onlinequant_backend.errors import InsecureCacheDirectoryError, OnlineQuantError

FILES = {"one": b"1", "two": b"22"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folders_are_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = atomic_files.make_private(tmp_path / "deep" / "root", "a", "b")
    finally:
        os.umask(before)
    assert made == tmp_path / "deep" / "root" / "a" / "b"
    for folder in (made, made.parent, made.parent.parent, tmp_path / "deep"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert atomic_files.make_private(tmp_path / "deep" / "root", "a", "b") == made


@pytest.mark.posix
@pytest.mark.parametrize("mode", [0o770, 0o720, 0o707, 0o702, 0o777])
def test_a_folder_that_others_can_write_to_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(InsecureCacheDirectoryError, match=f"others may write to it.*: chmod 700 '{folder}'"):
        atomic_files.check_private(folder)
    folder.chmod(0o700)
    atomic_files.check_private(folder)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o500])
def test_a_folder_that_others_can_only_read_is_fine(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    atomic_files.check_private(tmp_path)


@pytest.mark.posix
def test_a_shared_folder_is_not_to_be_made_private(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    with pytest.raises(InsecureCacheDirectoryError, match="Choose a folder inside it") as raised:
        atomic_files.check_private(tmp_path / "tmp")
    assert "chmod" not in str(raised.value)


@pytest.mark.posix
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(atomic_files.os, "geteuid", lambda: owner + 1)
    with pytest.raises(InsecureCacheDirectoryError, match=rf"belongs to the user {owner}.*ONLINEQUANT_CACHE_DIR"):
        atomic_files.check_private(tmp_path)


def test_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OnlineQuantError, match="is a link to"):
        atomic_files.check_private(tmp_path / "link")
    with pytest.raises(OnlineQuantError, match="is a link to"):
        atomic_files.make_private(tmp_path, "link")


@pytest.mark.posix
@pytest.mark.parametrize("mode", [0o777, 0o757, 0o722])
def test_a_folder_above_that_others_can_write_to_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    """They could put another folder in the place of ours, after every check of that has passed."""
    above = tmp_path / "shared by all"
    root = above / "between" / "root"
    root.mkdir(parents=True)
    above.chmod(mode)
    for use in (atomic_files.make_private, lambda root: Cache.open(str(root))):
        with pytest.raises(InsecureCacheDirectoryError, match=f"others may write to it.*: chmod go-w '{above}'; or "):
            use(root)
    above.chmod(0o1777)  # as /tmp: nobody can move what others have put there
    atomic_files.make_private(root)
    assert Cache.open(str(root)).root == root


@pytest.mark.posix
def test_in_a_folder_that_others_can_write_to_nothing_is_made(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(InsecureCacheDirectoryError, match="others may write to it"):
        atomic_files.make_private(tmp_path / "deep" / "root")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.posix
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_a_folder_above_that_is_somebody_elses_is_refused(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "theirs" / "root"
    root.mkdir(parents=True)
    root.parent.chmod(mode)
    os.chown(root.parent, 12345, -1)
    with pytest.raises(InsecureCacheDirectoryError, match="belongs to the user 12345, who can replace"):
        Cache.open(str(root))
    with pytest.raises(InsecureCacheDirectoryError, match="belongs to the user 12345, who can replace"):
        atomic_files.make_private(root)


@pytest.mark.posix
def test_the_group_of_a_user_alone_may_write_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a user has a group of the same name, a umask of 002 is common."""
    (tmp_path / "above" / "root").mkdir(parents=True)
    (tmp_path / "above").chmod(0o775)
    group = SimpleNamespace(gr_name="me", gr_mem=list[str]())
    monkeypatch.setattr("grp.getgrgid", lambda number: group)
    monkeypatch.setattr("pwd.getpwuid", lambda number: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(atomic_files, "_exposure", partial(_as_of_group, atomic_files._exposure, 1000))
    atomic_files.make_private(tmp_path / "above" / "root")
    group.gr_mem = ["me", "you"]
    with pytest.raises(InsecureCacheDirectoryError, match="others may write to it"):
        atomic_files.make_private(tmp_path / "above" / "root")
    group.gr_name, group.gr_mem = "users", []
    with pytest.raises(InsecureCacheDirectoryError, match="others may write to it"):
        atomic_files.make_private(tmp_path / "above" / "root")


def _as_of_group(ask: Callable[..., Any], group: int, folder: Path, info: os.stat_result) -> Any:
    return ask(folder, SimpleNamespace(st_mode=info.st_mode, st_uid=info.st_uid, st_gid=group))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        atomic_files.make_private(tmp_path, "file")
    with pytest.raises(NotADirectoryError):
        atomic_files.check_private(tmp_path / "file")


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert atomic_files.read_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(InvalidEntryError, match="file has 5 bytes, more than the 4 allowed"):
        atomic_files.read_file(tmp_path / "file", 4)
    with pytest.raises(FileNotFoundError):
        atomic_files.read_file(tmp_path / "absent", 4)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for name in ("link", "dangling"):
        with pytest.raises(InvalidEntryError, match="is a link"):
            atomic_files.read_file(tmp_path / name, 100)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidEntryError, match="pipe is no regular file"):
        atomic_files.read_file(tmp_path / "pipe", 100)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidEntryError, match="folder is no regular file"):
        atomic_files.read_file(tmp_path / "folder", 100)


def test_a_link_that_comes_at_the_last_moment_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(__file__)
    monkeypatch.setattr(Path, "lstat", Path.stat)
    with pytest.raises(OSError, match="link") as raised:
        atomic_files.read_file(tmp_path / "link", 10**6)
    assert raised.value.errno == errno.ELOOP


def test_a_socket_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(InvalidEntryError, match="socket is no regular file"):
            atomic_files.read_file(Path("socket"), 100)


def test_a_folder_is_published_with_nothing_left_over(tmp_path: Path) -> None:
    folder = atomic_files.publish_folder(tmp_path, "entries", "name", FILES)
    assert folder == tmp_path / "entries" / "name" and contents(folder) == FILES
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    atomic_files.publish_folder(tmp_path, "entries", "name", {"three": b""})
    assert contents(folder) == {"three": b""}
    assert list((tmp_path / "temporary").iterdir()) == list((tmp_path / "trash").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "link", "empty folder"])
def test_whatever_is_in_the_way_is_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("stays")
    place = atomic_files.make_private(tmp_path, "entries") / "name"
    if kind == "file":
        place.write_text("")
    elif kind == "link":
        place.symlink_to(tmp_path / "outside")
    else:
        place.mkdir()
    assert contents(atomic_files.publish_folder(tmp_path, "entries", "name", FILES)) == FILES
    assert not place.is_symlink() and contents(tmp_path / "outside") == {"file": b"stays"}


def test_who_publishes_at_the_same_moment_is_replaced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = 3

    def be_quicker(step: str) -> None:
        nonlocal quick
        if step == "before renaming" and quick:
            quick -= 1
            monkeypatch.setattr(atomic_files, "_step", lambda step: None)
            atomic_files.publish_folder(tmp_path, "entries", "name", {"quicker": b""})
            monkeypatch.setattr(atomic_files, "_step", be_quicker)

    monkeypatch.setattr(atomic_files, "_step", be_quicker)
    assert contents(atomic_files.publish_folder(tmp_path, "entries", "name", FILES)) == FILES
    assert quick == 0


def test_a_rename_that_is_refused_is_an_error_and_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PermissionError):
        atomic_files.publish_folder(tmp_path, "entries", "name", FILES)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_full_disk_leaves_the_old_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = atomic_files.publish_folder(tmp_path, "entries", "name", FILES)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_files.publish_folder(tmp_path, "entries", "name", {"new": b"new"})
    assert contents(folder) == FILES and list((tmp_path / "temporary").iterdir()) == []


def test_a_discarded_folder_is_never_seen_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = atomic_files.publish_folder(tmp_path, "entries", "name", FILES)
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(atomic_files, "_step", lambda step: seen.append((step, folder.exists())))
    monkeypatch.setattr(atomic_files, "delete", lambda path: seen.append(("delete", contents(path) == FILES)))
    assert atomic_files.discard(folder, tmp_path / "trash") is True
    assert seen == [("before moving the old away", True), ("after moving the old away", False), ("delete", True)]
    assert atomic_files.discard(folder, tmp_path / "trash") is False


def test_deleting_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("stays")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    atomic_files.delete(tmp_path / "link")
    atomic_files.delete(tmp_path / "folder")
    atomic_files.delete(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert contents(tmp_path / "outside") == {"file": b"stays"}


def test_the_size_counts_files_in_all_folders_but_no_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "large").write_bytes(bytes(100_000))
    root = tmp_path / "root"
    atomic_files.write_atomically(root / "a" / "b" / "one", "12345")
    atomic_files.write_atomically(root / "two", b"123")
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "large")
    assert 8 <= atomic_files.directory_size(root) < 1000


def test_a_directory_that_is_not_there_has_no_size(tmp_path: Path) -> None:
    assert atomic_files.directory_size(tmp_path / "absent") == 0


def test_writing_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    atomic_files.write_atomically(path, "old")
    atomic_files.write_atomically(path, "näw")
    assert path.read_text(encoding="utf-8") == "näw"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    atomic_files.write_atomically(path, "old")

    def fail(self: Path, target: Path) -> Any:
        raise OSError("disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        atomic_files.write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_the_folder_should_be_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        atomic_files.write_atomically(tmp_path / "taken" / "file.json", "text")


def test_what_a_user_names_is_written_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("new")
    atomic_files.write_where_told(tmp_path / "link", "1")
    atomic_files.write_where_told(tmp_path / "dangling", "2")
    assert contents(tmp_path) == {"file": b"1", "link": b"1", "new": b"2", "dangling": b"2"}
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert atomic_files.read_where_told(tmp_path / "link", 10) == b"1"


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    before = {path.name: path.lstat().st_mode for path in tmp_path.iterdir()}
    for name in before:
        with pytest.raises(OSError, match=r"no regular file|loop"):
            atomic_files.write_where_told(tmp_path / name, "text")
    assert {path.name: path.lstat().st_mode for path in tmp_path.iterdir()} == before
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
