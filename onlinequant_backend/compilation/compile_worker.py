"""The main program of the process that compiles for another one; see ``compile_process``."""

from __future__ import annotations

import os
import pickle
import queue
import threading
import traceback
from typing import IO

from .compile_process import IDLE, receive, send


def main() -> None:
    """Do what comes in, one thing after the other, until nothing does for a while or the other process is gone."""
    # Whatever else prints to standard output must not get between the messages.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if hasattr(os, "nice"):
        os.nice(5)  # sampling comes first, and still leaves it a quarter of busy processors
    messages: queue.Queue[bytes] = queue.Queue()
    # Not ``sys.stdin``: an interpreter that ends wants it back from whoever reads, and aborts.
    threading.Thread(target=_read, args=(os.fdopen(os.dup(0), "rb"), messages), daemon=True).start()
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
    os._exit(0)  # in the middle of whatever it is: nobody wants the result any more


def _done(work: bytes) -> tuple[bytes, float]:
    """A pickle of the result, or of what went wrong; and how long to wait for more."""
    patience = IDLE
    try:
        from ..torch_internals import torch_settings

        settings, function, args, patience = pickle.loads(work)
        torch_settings.apply_settings(settings)
        return pickle.dumps((function(*args), None)), patience
    except BaseException:
        return pickle.dumps((None, traceback.format_exc())), patience


if __name__ == "__main__":
    main()
