"""Keeping the cache small: what was last used longest ago goes first."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from ..best_effort import best_effort
from . import locks
from .atomic_files import TEMPORARY, TRASH, delete, directory_size, discard, make_private

ASIDE, ENTRIES, IMPORTED, INDUCTOR, LOCKS = "aside", "entries", "imported", "inductor", "locks"
WEIGHTS = "weights"
# What may be removed, and how its name looks. Whatever has another name is not ours to remove.
_NAMES = {
    ASIDE: ".+",
    WEIGHTS: "[0-9a-f]{48}",
    ENTRIES: "[0-9a-f]{64}",
    IMPORTED: "[0-9a-f]{32}",
    INDUCTOR: "[0-9a-f]{32}",
}
# In this order; all others come last. Weights are large, and are quantized again within seconds.
_FIRST_TO_GO = (ASIDE, WEIGHTS)
GIGABYTE, DAY = 10**9, 86400.0
# Seconds after which nobody is still writing into a temporary folder.
_STALE = 3600.0


@dataclasses.dataclass(frozen=True)
class Item:
    """Something that can be removed by itself.

    Attributes:
        kind: "aside" (a corrupt entry), "weights", "entries", "imported" or "inductor": the folder of the cache that it
            lies in.
        path: its own folder.
        size: bytes.
        last_used: seconds since 1970.
    """

    kind: str
    path: Path
    size: int
    last_used: float


def items(root: Path) -> list[Item]:
    """Everything that can be removed, in the order of removing: corrupt entries, 8-bit weights, then by last use."""
    found = [item for kind in _NAMES for path in paths(root, kind) for item in _item(kind, path)]
    return sorted(found, key=lambda item: (_turn(item.kind), item.last_used))


def _turn(kind: str) -> int:
    return _FIRST_TO_GO.index(kind) if kind in _FIRST_TO_GO else len(_FIRST_TO_GO)


def paths(root: Path, kind: str) -> list[Path]:
    """What lies in one folder of the cache; empty where the folder is not there or is a link."""
    folder = root / kind
    if folder.is_symlink():
        return []
    try:
        return [path for path in folder.iterdir() if re.fullmatch(_NAMES[kind], path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _item(kind: str, path: Path) -> Iterator[Item]:
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        info = path.lstat()
        size = info.st_size if path.is_symlink() or not path.is_dir() else directory_size(path)
        yield Item(kind, path, size, info.st_mtime)


def evict(root: Path, limit: float, keep: Collection[Path] = ()) -> list[Item]:
    """Remove items until all of them together have at most ``limit`` bytes; returns what was removed.

    Items in ``keep``, and those that are locked by anybody, stay.
    """
    sweep(root)
    candidates = items(root)
    size = sum(item.size for item in candidates)
    removed = []
    for item in candidates:
        if size <= limit:
            break
        if item.path not in keep and _remove(root, item):
            size -= item.size
            removed.append(item)
    return removed


def clear(root: Path, older_than_days: float | None, max_size_gb: float | None) -> list[Item]:
    """Remove what was not used for so many days, then the oldest until no more than so many GB (10**9 bytes) are left.

    Without either, everything; corrupt entries in any case. Locked items stay. Returns what was removed.
    """
    sweep(root)
    everything = older_than_days is None and max_size_gb is None
    youngest = time.time() - (older_than_days or 0) * DAY
    too_old = [
        item
        for item in items(root)
        if everything or item.kind == ASIDE or (older_than_days is not None and item.last_used < youngest)
    ]
    removed = [item for item in too_old if _remove(root, item)]
    return removed if max_size_gb is None else removed + evict(root, max_size_gb * GIGABYTE)


def sweep(root: Path) -> None:
    """Delete what processes that were killed have left behind."""
    for name, age in ((TRASH, -math.inf), (TEMPORARY, _STALE)):
        folder = root / name
        if folder.is_dir() and not folder.is_symlink():
            for path in folder.iterdir():
                with contextlib.suppress(OSError):  # another process deletes it, too
                    if path.lstat().st_mtime <= time.time() - age:
                        delete(path)


def _remove(root: Path, item: Item) -> bool:
    """Remove one item unless it is locked or was used since it was listed; returns whether it is gone."""
    with best_effort("cannot remove %s", item.path), contextlib.ExitStack() as stack:
        for path in _lock_files(root, item):
            # A lock of our own is no less in use, though another thread would be let in.
            lock = None if locks.is_held_here(path) else locks.acquire(path, 0)
            if lock is None:
                return False
            stack.enter_context(lock)
        unused = os.path.lexists(item.path) and item.path.lstat().st_mtime == item.last_used
        return unused and discard(item.path, make_private(root, TRASH))
    return False


def _lock_files(root: Path, item: Item) -> list[Path]:
    """The locks that users of ``item`` hold. An Inductor folder serves all weights, an imported file all machines."""
    name, folder = item.path.name, make_private(root, LOCKS)
    if item.kind in (ENTRIES, WEIGHTS):
        return [folder / f"{name[:48]}.lock"]
    if item.kind == IMPORTED:
        return list(folder.glob(f"{name}*.lock"))
    if item.kind == INDUCTOR:
        return list(folder.glob(f"{name[:16]}{'?' * 16}{name[16:]}.lock"))
    return []
