"""The cache's way with the disk: private folders, reading that follows no link, and writing all or nothing.

Everything here raises OSError where the disk does not do what it should; ``Cache`` catches that.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from ..errors import InsecureCacheDirectoryError
from ..operating_system import is_link, is_own_group, patiently, quoted, user_id
from .calibration_checks import InvalidEntryError

# Folders of a cache for what is not yet and what is no longer of use.
TEMPORARY, TRASH = "temporary", "trash"
# A rename meets what another process has put there meanwhile; that many times in a row is no coincidence.
_ATTEMPTS = 100

Writer = Callable[[BinaryIO], object]


def _step(name: str) -> None:
    """Marks a point of publishing. Tests replace this by a function that ends the process there."""


def insecurity(path: Path, info: os.stat_result) -> str | None:
    """Why others could change what lies in the folder ``path``, and the remedy; None if they cannot.

    ``info``: what ``lstat`` says of it. Raises NotADirectoryError for anything but a folder or a link.
    """
    if is_link(info):
        return f"it is a link to {str(path.readlink())!r}. Remove it: nothing in a cache may lead out of it."
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(f"{str(path)!r} is no directory")
    user = user_id()
    if user is None:  # on Windows: a user's folders are private there, and modes and owners say nothing
        return None
    if info.st_uid != user:
        return (
            f"it belongs to the user {info.st_uid}, and this is the user {user}. Choose a directory of your "
            "own, with the option cache_dir or ONLINEQUANT_CACHE_DIR."
        )
    if info.st_mode & stat.S_ISVTX and info.st_mode & stat.S_IWOTH:  # /tmp and the like, which are meant to be shared
        return "everybody may write to it. Choose a folder inside it as the cache directory."
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it. Forbid that: chmod 700 {quoted(str(path))}"
    return None


def check_private(folder: Path) -> None:
    """Raise InsecureCacheDirectoryError unless only this user can change what lies in ``folder``."""
    _refuse(folder, insecurity(folder, folder.lstat()))


def check_parent(folder: Path) -> None:
    """Raise InsecureCacheDirectoryError if others could put another folder in the place of one that lies in ``folder``,
    which is any folder above the cache."""
    _refuse(folder, _exposure(folder, folder.lstat()))


def _refuse(folder: Path, reason: str | None) -> None:
    if reason is not None:
        raise InsecureCacheDirectoryError(
            f"The cache holds code that will be run, so {str(folder)!r} is not safe to use: {reason}"
        )


def _exposure(folder: Path, info: os.stat_result) -> str | None:
    user = user_id()
    if user is None:
        return None
    elsewhere = "choose a cache directory elsewhere, with the option cache_dir or ONLINEQUANT_CACHE_DIR."
    # Whoever owns "/", another user than root in some containers, can replace everything anyway.
    if info.st_uid not in (0, user, Path("/").stat().st_uid):
        return f"it belongs to the user {info.st_uid}, who can replace all that lies in it. So {elsewhere}"
    # With the sticky bit, as /tmp has it, nobody can move what others have put there.
    is_open = info.st_mode & stat.S_IWOTH or (info.st_mode & stat.S_IWGRP and not is_own_group(info.st_gid))
    if is_open and not info.st_mode & stat.S_ISVTX:
        forbid = f"chmod go-w {quoted(str(folder))}"
        return f"others may write to it, and so replace all that lies in it. Forbid that: {forbid}; or {elsewhere}"
    return None


def make_private(root: Path, *names: str) -> Path:
    """Make the folder ``root/names[0]/names[1]/...`` and return it; each one is checked with ``check_private``, and all
    above ``root`` with ``check_parent``."""
    # From above, and each one is checked after it was made: somebody may have been quicker.
    above = root.absolute().parent.resolve()
    for parent in (*reversed(above.parents), above):
        parent.mkdir(mode=0o700, exist_ok=True)
        check_parent(parent)
    root.mkdir(mode=0o700, exist_ok=True)
    check_private(root)
    for name in names:
        root /= name
        root.mkdir(mode=0o700, exist_ok=True)
        check_private(root)
    return root


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file, at most ``limit``; raises InvalidEntryError for anything else."""
    with opened(path, limit) as file:
        return file.read(limit)


@contextlib.contextmanager
def opened(path: Path, limit: float = math.inf) -> Iterator[BinaryIO]:
    """A regular file of at most ``limit`` bytes, to read; raises InvalidEntryError for anything else."""
    _check_readable(path, path.lstat(), limit)
    # In case it has become a link or a pipe since, which would lead elsewhere or wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(patiently(os.open, path, flags), "rb") as file:
        _check_readable(path, os.fstat(file.fileno()), limit)
        yield file


def read_where_told(path: Path, limit: int) -> bytes:
    """``read_file`` for a file that the user has named, which may be a link."""
    return read_file(_led_to(path), limit)


def _led_to(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # links in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def _check_readable(path: Path, info: os.stat_result, limit: float) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise InvalidEntryError(f"{path.name} is {'a link' if stat.S_ISLNK(info.st_mode) else 'no regular file'}")
    if info.st_size > limit:
        raise InvalidEntryError(f"{path.name} has {info.st_size} bytes, more than the {limit} allowed")


def publish_folder(root: Path, kind: str, name: str, files: Mapping[str, bytes | Writer]) -> Path:
    """Make the folder ``root/kind/name`` hold exactly ``files``, and return it. What is large is given as a function
    that writes it.

    A reader sees what was there before, or nothing, or all of the new: never a part.
    """
    folder = make_private(root, kind) / name
    trash = make_private(root, TRASH)
    new = make_private(root, TEMPORARY) / secrets.token_hex(16)
    new.mkdir(mode=0o700)
    old = []
    try:
        for file, content in files.items():
            _write(new / file, content)
        _sync_folder(new)
        for attempt in range(1, _ATTEMPTS + 1):
            old.append(_move_away(folder, trash))
            _step("before renaming")
            try:
                patiently(new.rename, folder)
                break
            except OSError:
                if attempt == _ATTEMPTS or not os.path.lexists(folder):
                    raise
        _step("after renaming")
        _sync_folder(folder.parent)
    except BaseException:
        delete(new)
        raise
    for path in filter(None, old):  # not before, since until the new is there every load is a miss
        delete(path)
    return folder


def _write(path: Path, content: bytes | Writer) -> None:
    _step(f"before writing {path.name}")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if isinstance(content, bytes):
            file.write(content[: len(content) // 2])
            file.flush()
            _step(f"while writing {path.name}")
            file.write(content[len(content) // 2 :])
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())
    _step(f"after writing {path.name}")


def _sync_folder(folder: Path) -> None:
    """Have the folder's names on the disk before what comes next, so that a power cut leaves no half entry either."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder, and some network disks cannot sync one
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def discard(path: Path, trash: Path) -> bool:
    """Delete ``path`` such that a reader sees all of it or nothing; returns whether it was there."""
    away = _move_away(path, trash)
    if away is not None:
        delete(away)
    return away is not None


def _move_away(path: Path, trash: Path) -> Path | None:
    """Where ``path`` is now; None if it was not there."""
    away = trash / secrets.token_hex(16)
    _step("before moving the old away")
    try:
        patiently(path.rename, away)  # of a link, the link itself
    except FileNotFoundError:
        return None
    _step("after moving the old away")
    return away


@contextlib.contextmanager
def replaced(folder: Path, aside: Path) -> Iterator[None]:
    """Within the block another, empty folder has the place of ``folder``, which lies in the folder ``aside`` meanwhile:
    it comes back if the block raises, and is deleted otherwise."""
    old = _move_away(folder, aside)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        yield
    except BaseException:
        if old is not None:
            discard(folder, aside)
            patiently(old.rename, folder)
        raise
    if old is not None:
        delete(old)


def delete(path: Path) -> None:
    """Delete a file, a link or a folder, or as much of it as can be deleted."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content``, text as UTF-8, to ``path``, making its folder: a reader sees the old file or the new one.

    Raises OSError where that cannot be done, and then leaves no temporary file behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because replacing is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        patiently(temporary.replace, path)
    except BaseException:
        delete(temporary)
        raise


def write_where_told(path: Path, content: str | bytes) -> None:
    """``write_atomically`` for a file that the user has named, which may be a link: then what it leads to is written.

    Raises OSError also where there is something that is no regular file, such as a device or a pipe.
    """
    path = _led_to(path)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "it exists and is no regular file", str(path))
    write_atomically(path, content)


def directory_size(path: Path) -> int:
    """Bytes in all files below ``path``; 0 where there is no such directory. Links are not followed."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += Path(folder, name).lstat().st_size
            except FileNotFoundError:  # another process took it away meanwhile
                continue
    return total
