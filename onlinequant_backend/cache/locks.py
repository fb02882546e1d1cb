"""Locks between processes: one file each, which the operating system unlocks when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock, FileLock, Timeout

from ..progress import Progress


class Lock:
    """One hold of a lock file. Within a process a lock can be held many times; other processes wait for the last."""

    def __init__(self, file: BaseFileLock) -> None:
        # A finalizer, because a model that is deleted in the middle of its calibration must not keep others waiting.
        self._finalizer = weakref.finalize(self, _release, file, os.getpid())

    def release(self) -> None:
        """Give up this hold, from any thread; twice is once."""
        self._finalizer()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def acquire(path: Path, timeout: float, waiting_for: str = "") -> Lock | None:
    """Hold the lock file ``path``, whose folder is there; None if another process keeps it for ``timeout`` seconds.

    ``waiting_for``: what to show while waiting. Raises OSError where there can be no lock.
    """
    if path.is_symlink():  # an older filelock would follow it and empty the file that it leads to
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    file = _file(path)
    try:
        file.acquire(timeout=0)
        return Lock(file)
    except Timeout:
        if timeout <= 0:
            return None
    with Progress(waiting_for):
        try:
            file.acquire(timeout=timeout)
        except Timeout:
            return None
    return Lock(file)


def is_held_here(path: Path) -> bool:
    """Whether this process holds the lock file ``path``."""
    return _file(path).is_locked


def _file(path: Path) -> BaseFileLock:
    # One object a path for all threads: it counts its holders, and two models of equal content do not wait in vain.
    return FileLock(path, mode=0o600, thread_local=False, is_singleton=True)


def _release(file: BaseFileLock, process: int) -> None:
    if os.getpid() == process:  # a fork holds copies of its parent's locks, which are not its own to release
        with contextlib.suppress(OSError):  # such as a network disk that is gone, and the lock with it
            file.release()
