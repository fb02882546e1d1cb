"""Best-effort work: errors, such as those of the cache, become warnings, one for each kind of error."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from . import fork_locks

_log = logging.getLogger("onlinequant")
_said: set[str] = set()
_lock = fork_locks.lock()


def warn_once(kind: str, message: str, *arguments: object) -> None:
    """Log ``message`` as a warning the first time that ``kind`` occurs in this process."""
    with _lock:
        first = kind not in _said
        _said.add(kind)
    _log.log(logging.WARNING if first else logging.DEBUG, message, *arguments)


def forget() -> None:
    """Warn again of every kind of error, as a new process does."""
    with _lock:
        _said.clear()


@contextlib.contextmanager
def best_effort(message: str, *arguments: object) -> Iterator[None]:
    """A block in which any error becomes a warning that begins with ``message``. A full disk fails in many places, but
    counts as one kind of error.
    """
    try:
        yield
    except Exception as error:
        # Not only OSError: an error of the cache, which saves seconds, must not lose an image that took minutes.
        kind = f"{type(error).__name__} {getattr(error, 'errno', '')}"
        explained = f"{message}: %s. Going on without it."
        warn_once(kind, explained, *arguments, str(error).rstrip(".") or type(error).__name__)
