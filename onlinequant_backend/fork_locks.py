"""Locks that survive a fork: the child lacks the other threads, so locks that these held would never be released."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def lock() -> threading.Lock:
    """A ``threading.Lock`` that is free in the child of a fork."""
    made = threading.Lock()
    _locks.add(made)
    return made


def rlock() -> Any:
    """A ``threading.RLock`` that is free in the child of a fork, unless the thread that forked holds it."""
    made = threading.RLock()
    _locks.add(made)
    return made


def free(lock: Any) -> None:
    """Free a lock in the child of a fork, where the thread that held it no longer exists."""
    is_mine = getattr(lock, "_is_owned", lambda: False)()
    if not is_mine:
        lock._at_fork_reinit()


def in_child(function: Callable[[], object]) -> None:
    """Register ``function`` to be called in each process forked from this one, after the locks above are free."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def _free_all() -> None:
    for lock in list(_locks):
        free(lock)


in_child(_free_all)  # callbacks are called in the order of registration
