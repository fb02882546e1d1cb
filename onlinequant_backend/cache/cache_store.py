"""What is kept between runs: calibrations, statistics and Inductor's caches, in one directory.

::

    entries/<key>/                      calibration.safetensors and quantization_stats.json of one graph
    imported/<key[:32]>/                calibration.safetensors from another machine
    weights/<key[:48]>/                 weights.safetensors: a checkpoint's 8-bit weights, with the option save_weights
    inductor/<key[:16]><key[32:48]>/    Inductor's own caches, which hold code; shared by a model's checkpoints
    locks/<key[:48]>.lock               held by the process that calibrates this model
    aside/                              entries that were corrupt
    temporary/, trash/                  what is being written and deleted
    compile_times.json                  how long compiling took here

A key is 64 hex digits, four parts of 16: what holds on every machine, the weights, the machine, the graph; see
``graph_key``. Entries whose keys differ in the last part only are of one model, at other shapes or with other options,
and share a calibration.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from ..best_effort import best_effort, warn_once
from ..operating_system import patiently
from . import eviction, listing, locks
from .atomic_files import (
    TEMPORARY,
    TRASH,
    check_parent,
    check_private,
    insecurity,
    make_private,
    publish_folder,
    read_file,
    replaced,
    write_atomically,
)
from .calibration_checks import InvalidEntryError
from .calibration_file import (
    AUTOTUNING_FILE,
    CALIBRATION_FILE,
    MAX_BYTES,
    STATS_FILE,
    Calibration,
    parse_object,
)
from .eviction import ASIDE, ENTRIES, GIGABYTE, IMPORTED, INDUCTOR, LOCKS, WEIGHTS, Item
from .listing import EntryInfo
from .locks import Lock

# The first is ours; the second is the predecessor's, so that its users' set-ups go on working.
ENVIRONMENT_VARIABLES = ("ONLINEQUANT_CACHE_DIR", "COMFYUI_ONEDIFF_SAVE_GRAPH_DIR")
_FOLDERS = (ENTRIES, WEIGHTS, IMPORTED, INDUCTOR, LOCKS, ASIDE, TEMPORARY, TRASH)
# Inductor folders that this process was given: it may compile into them at any time, so it does not evict them.
_in_use: set[Path] = set()


def cache_directory(configured: str | None) -> Path:
    """The root of the cache: the option ``cache_dir``, else the environment, else the user's cache directory.

    The directory need not exist. Raises FileNotFoundError where there is no home directory to put it into.
    """
    named = next(filter(None, (configured, *map(os.environ.get, ENVIRONMENT_VARIABLES))), None)
    try:
        path = platformdirs.user_cache_path("onlinequant") if named is None else Path(named).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{error}; let {ENVIRONMENT_VARIABLES[0]} name a directory") from None
    if named is None and not path.is_absolute():  # what an older platformdirs gives instead of an error
        raise FileNotFoundError(f"no home directory is known; let {ENVIRONMENT_VARIABLES[0]} name a directory")
    return path


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (RuntimeError, ValueError) as error:  # links in a circle; a character that no path has
        raise OSError(f"{str(path)!r} is no path: {error}") from None


class Cache:
    """One cache directory. Whatever the disk does, its methods return, with a warning in the log the first time.

    Only ``open`` raises, for a directory that is not safe; a key that is none is a ValueError everywhere.

    Attributes:
        root: the directory, without links; None if there is no directory to be had, and then every load is a miss.
        limit: bytes that it may have.
    """

    def __init__(self, root: Path | None, size_limit: float) -> None:
        self.root = root
        self.limit = size_limit * GIGABYTE

    @classmethod
    def open(cls, configured: str | None, size_limit: float = 20.0) -> Cache:
        """The cache in ``cache_directory(configured)``, which is made when something is first written.

        ``size_limit``: GB (10**9 bytes) of everything in it. Raises InsecureCacheDirectoryError for a directory that
        belongs to somebody else, that others can write to, or of which a part is a link.
        """
        try:
            # The only link that is followed: the directory itself may be one.
            root = _resolved(cache_directory(configured))
            for folder in root.parents:
                with contextlib.suppress(FileNotFoundError):
                    check_parent(folder)
            for folder in (root, *(root / name for name in _FOLDERS)):
                with contextlib.suppress(FileNotFoundError):
                    check_private(folder)
        except OSError as error:
            warn_once("directory", "there is no cache directory: %s. Going on without it.", error)
            return cls(None, size_limit)
        return cls(root, size_limit)

    def load(self, key: str) -> Calibration | None:
        """The calibration for ``key``: its own, else the newest of the model at other shapes, else an imported one.

        None is a miss. Corrupt entries that are met on the way are moved aside, unless another process has the lock.
        """
        _check_key(key)
        if self.root is None:
            return None
        for folder in _places(self.root, key):
            with best_effort("cannot read %s", folder):
                calibration = _load(self.root, folder)
                if calibration is not None:
                    return calibration
        return None

    def has(self, key: str) -> bool:
        """Whether there is an entry of exactly this key; a corrupt one counts."""
        _check_key(key)
        if self.root is None:
            return False
        folder = self.root / ENTRIES / key
        with contextlib.suppress(OSError):
            return stat.S_ISDIR(folder.lstat().st_mode) and stat.S_ISREG((folder / CALIBRATION_FILE).lstat().st_mode)
        return False

    def publish(self, key: str, calibration: Calibration, stats: str, autotuning: str | None = None) -> Path | None:
        """Make these the entry of ``key``, then evict what is over the limit.

        ``stats``, ``autotuning``: JSON. Returns where ``quantization_stats.json`` lies; None if it was not written.
        """
        _check_key(key)
        if self.root is None:
            return None
        with best_effort("cannot write to the cache %s", self.root):
            files = {CALIBRATION_FILE: calibration.to_bytes(key), STATS_FILE: stats.encode()}
            if autotuning is not None:
                files[AUTOTUNING_FILE] = autotuning.encode()
            folder = publish_folder(self.root, ENTRIES, key, files)
            self.make_room(key, folder)
            return folder / STATS_FILE
        return None

    def make_room(self, key: str, folder: Path) -> None:
        """Evict what is over the limit, but for the entry of ``key`` and ``folder``, which was just written."""
        if self.root is not None:
            with best_effort("cannot make room in the cache %s", self.root):
                keep = {folder, self.root / ENTRIES / key, _inductor_folder(self.root, key), *_in_use}
                eviction.evict(self.root, self.limit, keep)

    def update_stats(self, key: str, stats: str) -> None:
        """Replace the statistics of ``key``, JSON, if it has an entry."""
        if self.root is not None and self.has(key):
            with best_effort("cannot write to the cache %s", self.root), contextlib.suppress(FileNotFoundError):
                write_atomically(self.root / ENTRIES / key / STATS_FILE, stats)

    def update_calibration(self, key: str, calibration: Calibration) -> None:
        """Replace the calibration of ``key``, if it has an entry that no other process has locked."""
        lock = self.lock(key, 0) if self.has(key) else None
        if self.root is None or lock is None:
            return
        with lock, best_effort("cannot write to the cache %s", self.root):
            if self.has(key):  # nothing evicts it any more
                write_atomically(self.root / ENTRIES / key / CALIBRATION_FILE, calibration.to_bytes(key))

    def load_stats(self, key: str, alike: bool = False) -> dict[str, Any]:
        """The statistics of ``key``, a JSON object of which nothing else was checked; with ``alike``, else those of the
        newest entry of the model at other shapes or with other options. Empty if there are none."""
        _check_key(key)
        for folder in itertools.islice(_places(self.root, key) if self.root else (), None if alike else 1):
            with best_effort("cannot read %s", folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return parse_object(read_file(folder / STATS_FILE, MAX_BYTES), STATS_FILE)
        return {}

    def load_autotuning(self, key: str) -> str | None:
        """What was measured for ``key``, or for another checkpoint or size of its model on such a machine: JSON that
        has not been checked. None if there is nothing."""
        _check_key(key)
        if self.root is None:
            return None
        with best_effort("cannot read the cache %s", self.root):
            alike = [path for path in eviction.paths(self.root, ENTRIES) if path.name[:16] == key[:16]]
            alike = [path for path in alike if path.name[32:48] == key[32:48]]
            for path in sorted(alike, key=lambda path: path.name != key):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
                    if insecurity(path, path.lstat()) is None:
                        return read_file(path / AUTOTUNING_FILE, MAX_BYTES).decode()
        return None

    def lock(self, key: str, timeout: float) -> Lock | None:
        """Keep other processes from calibrating the model of ``key``, whatever the shapes.

        ``timeout``: seconds to wait for another process that does. None: it went on for longer, or nothing can be
        locked here. Within a process the lock can be held many times.
        """
        _check_key(key)
        if self.root is None:
            return None
        with best_effort("cannot lock the cache %s", self.root):
            lock = locks.acquire(
                make_private(self.root, LOCKS) / f"{key[:48]}.lock",
                timeout,
                "waiting for another process that is calibrating this model",
            )
            if lock is None and timeout > 0:
                warn_once("timeout", "another process has been calibrating this model for over %g s", timeout)
            return lock
        return None

    def inductor_directory(self, key: str) -> Path | None:
        """The folder for Inductor's caches, which is made if need be; None where nothing can be written to it.

        Ask again before each compilation: another process may have deleted it.
        """
        _check_key(key)
        if self.root is None:
            return None
        with best_effort("cannot keep compiled code in the cache %s", self.root):
            folder = make_private(self.root, INDUCTOR, _inductor_folder(self.root, key).name)
            os.utime(folder)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
            _in_use.add(folder)
            return folder
        return None

    def has_compiled(self, key: str) -> bool:
        """Whether there is any compiled graph for such a key; see ``inductor_job.is_in_cache``."""
        directory = self.inductor_directory(key) if self.has(key) else None
        return directory is not None and any(directory.glob("compiled-*"))

    def entries(self) -> list[EntryInfo]:
        """Every calibration, last used first."""
        if self.root is not None:
            with best_effort("cannot read the cache %s", self.root):
                return listing.entries(self.root)
        return []

    def clear(self, older_than_days: float | None = None, max_size_gb: float | None = None) -> list[Item]:
        """Remove what was not used for so many days, and then the oldest until at most so many GB are left.

        Without either, everything. What another process has locked stays. Returns what was removed.
        """
        if self.root is not None:
            with best_effort("cannot make room in the cache %s", self.root):
                return eviction.clear(self.root, older_than_days, max_size_gb)
        return []


@contextlib.contextmanager
def emptied(directory: Path) -> Iterator[None]:
    """Within the block an ``inductor_directory`` is empty. What it held is back after an error, and else is deleted."""
    with replaced(directory, make_private(directory.parents[1], TEMPORARY)):
        yield


def _load(root: Path, folder: Path) -> Calibration | None:
    """The calibration in a folder; None if there is none, and a corrupt entry is then moved aside."""
    try:
        calibration = _read(folder)
    except InvalidEntryError as error:
        calibration = _read_again(root, folder, error)
    if calibration is not None:
        with contextlib.suppress(OSError):  # a cache that can only be read is fine
            os.utime(folder)
    return calibration


def _read_again(root: Path, folder: Path, error: InvalidEntryError) -> Calibration | None:
    """The same for what looked corrupt, under the lock, for it may have been replaced before we had that."""
    try:
        lock = locks.acquire(make_private(root, LOCKS) / f"{folder.name[:48]}.lock", 0)
        if lock is None:  # its holder will replace the entry
            return None
        with lock:
            try:
                return _read(folder)
            except InvalidEntryError as still:
                error = still
            patiently(folder.rename, make_private(root, ASIDE) / f"{folder.name}.{secrets.token_hex(4)}")
        outcome = "was moved aside"
    except OSError as obstacle:
        outcome = f"cannot be moved aside ({obstacle})"
    warn_once("corrupt", "a corrupt entry of the cache, %s, %s: %s", folder, outcome, error)
    return None


def _read(folder: Path) -> Calibration | None:
    """The calibration in a folder, None if there is no such folder; raises InvalidEntryError for a corrupt entry."""
    try:
        check_private(folder.parent)
        reason = insecurity(folder, folder.lstat())
        if reason is not None:
            raise InvalidEntryError(reason)
        calibration = Calibration.from_bytes(read_file(folder / CALIBRATION_FILE, MAX_BYTES), folder.name)
        if folder.parent.name == ENTRIES:
            parse_object(read_file(folder / STATS_FILE, MAX_BYTES), STATS_FILE)
        return calibration
    except NotADirectoryError as error:
        raise InvalidEntryError(str(error)) from None
    except FileNotFoundError as error:
        if os.path.lexists(folder):
            raise InvalidEntryError(f"it has no {Path(error.filename).name}") from None
        return None


def _places(root: Path, key: str) -> Iterator[Path]:
    """Where a calibration for ``key`` may lie, best first."""
    yield root / ENTRIES / key
    used = {}
    with best_effort("cannot read the cache %s", root):
        for path in eviction.paths(root, ENTRIES):
            if path.name.startswith(key[:48]) and path.name != key:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    used[path] = path.lstat().st_mtime
    yield from sorted(used, key=lambda path: used[path], reverse=True)
    yield root / IMPORTED / key[:32]


def _inductor_folder(root: Path, key: str) -> Path:
    return root / INDUCTOR / f"{key[:16]}{key[32:48]}"


def _check_key(key: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise ValueError(f"a cache key is 64 lower-case hex digits, not {key!r}")
