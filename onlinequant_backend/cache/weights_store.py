"""The 8-bit weights of checkpoints in the cache: one file for all entries of a checkpoint on such a machine."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..best_effort import best_effort, warn_once
from . import atomic_files, weights_file
from .cache_store import Cache
from .calibration_checks import InvalidEntryError
from .eviction import WEIGHTS
from .weights_file import WEIGHTS_FILE, SavedWeight, WeightsFile

_log = logging.getLogger("onlinequant")


def load(cache: Cache, key: str) -> WeightsFile | None:
    """The weights for ``key``; None is a miss. A damaged file is deleted."""
    if cache.root is None:
        return None
    folder = _folder(cache.root, key)
    with best_effort("cannot read %s", folder), contextlib.suppress(FileNotFoundError):
        for path in (folder.parent, folder):
            atomic_files.check_private(path)
        try:
            found = weights_file.read(folder / WEIGHTS_FILE, key[:48])
        except InvalidEntryError as error:
            discard(cache, key, str(error))
            return None
        with contextlib.suppress(OSError):  # a cache that can only be read is fine
            os.utime(folder)
        return found
    return None


def discard(cache: Cache, key: str, reason: str) -> None:
    """Delete the weights for ``key``, which are damaged, unless another process has the lock and may replace them."""
    if cache.root is None:
        return
    folder = _folder(cache.root, key)
    warn_once("weights", "8-bit weights in the cache, %s, are not used: %s", folder, reason)
    with best_effort("cannot remove %s", folder):
        lock = cache.lock(key, 0)
        if lock is not None:
            with lock:
                atomic_files.discard(folder, atomic_files.make_private(cache.root, atomic_files.TRASH))


def publish(
    cache: Cache,
    key: str,
    model: str,
    outline: Sequence[SavedWeight],
    made: Iterable[tuple[SavedWeight, memoryview, bytes]],
) -> None:
    """Save weights for ``key``, as ``weights_file.write`` takes them, and evict what is over the limit; saves nothing
    that is larger than the cache may be."""
    if cache.root is None:
        return
    folder, size = _folder(cache.root, key), weights_file.size_of(outline)
    if size > cache.limit:
        _log.info("8-bit weights of %.1f GB are not saved: the cache may have %.1f GB", size / 1e9, cache.limit / 1e9)
        return
    with best_effort("cannot save 8-bit weights in %s", folder):
        lock = cache.lock(key, 0)
        if lock is None:
            return
        with lock:
            atomic_files.publish_folder(
                cache.root,
                WEIGHTS,
                folder.name,
                {WEIGHTS_FILE: lambda file: weights_file.write(file, folder.name, model, outline, made)},
            )
            cache.make_room(key, folder)


def _folder(root: Path, key: str) -> Path:
    return root / WEIGHTS / key[:48]
