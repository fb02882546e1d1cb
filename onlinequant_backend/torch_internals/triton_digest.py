"""The digest of Triton that is part of the keys of Inductor's and Triton's caches.

Triton reads and hashes its library for it, half a gigabyte, once in a process. That hardly needs Python's lock, so
another thread does it while Dynamo traces.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

_thread: threading.Thread | None = None


def begin() -> None:
    """Have another thread compute the digest, if no call of this has done so before, and Triton is imported."""
    global _thread
    # Not imported here or in the thread: two threads that import parts of one package may wait for each other.
    digest: Any = getattr(sys.modules.get("triton.runtime.cache"), "triton_key", None)
    if _thread is None and digest is not None:
        _thread = threading.Thread(target=_compute, args=(digest,), name="onlinequant-triton-digest", daemon=True)
        _thread.start()


def wait() -> None:
    """Wait until the digest is known, if ``begin`` was called: whoever needs it now would compute it once more."""
    if _thread is not None:
        _thread.join()  # in the child of a fork, it has ended


def _compute(digest: Any) -> None:
    with contextlib.suppress(Exception):  # for example OSError; who needs it will see the same
        digest()
