"""The main program of the process that compiles for another one; see ``compile_process``."""

from __future__ import annotations

import os
import pickle
import queue
import threading
import traceback
from typing import IO

from ..operating_system import be_nice
from .compile_process import IDLE, receive, send


def main() -> None:
    """Run the incoming work, one piece at a time, until none comes for a while or the other process exits."""
    # Other prints to standard output must not get between the messages.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    be_nice()  # sampling has priority
    messages: queue.Queue[bytes] = queue.Queue()
    # Not ``sys.stdin``: the interpreter aborts if it exits while a thread reads from it.
    requests = os.fdopen(os.dup(0), "rb")
    # A compiler must not inherit the pipe: on Windows it would wait for its next message when it starts.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_read, args=(requests, messages), daemon=True).start()
    patience = IDLE
    while True:
        try:
            work = messages.get(timeout=patience)
        except queue.Empty:
            return
        reply, patience = _done(work)
        send(replies, reply)


def _read(stream: IO[bytes], messages: queue.Queue[bytes]) -> None:
    while (message := receive(stream)) is not None:
        messages.put(message)
    os._exit(0)  # even in the middle of work: the process that needs the result has exited


def _done(work: bytes) -> tuple[bytes, float]:
    """A pickle of the result or the traceback, and the seconds to wait for more work."""
    patience = IDLE
    try:
        from ..torch_internals import torch_settings

        settings, function, args, patience = pickle.loads(work)
        torch_settings.apply_settings(settings)
        return pickle.dumps((function(*args), None)), patience
    except BaseException:
        return pickle.dumps((None, traceback.format_exc())), patience
