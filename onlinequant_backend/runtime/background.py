"""Work in another thread, with the grad mode, inference mode and listener of the thread that starts it."""

from __future__ import annotations

import atexit
import concurrent.futures.process
import concurrent.futures.thread  # noqa: F401
import contextvars
import logging
import threading
import weakref
from collections.abc import Callable

import torch

from .. import fork_locks
from ..compilation.compile_process import in_background
from ..torch_internals import dynamo_interface

_log = logging.getLogger("onlinequant")

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_all: weakref.WeakSet[Background] = weakref.WeakSet()


class _Lost:
    """Replaces a thread that does not exist in the child of a fork: its work never ends."""

    def is_alive(self) -> bool:
        return True


class Background:
    """At most one piece of work at a time. A process that exits waits for it while Inductor can still compile: its
    result is saved in the cache, and stopping a thread within torch aborts the process. In a process forked meanwhile
    the work never ends and no other is started, since the fork copied torch's state in the middle of it: objects that
    are busy then, or are created later, stay busy. ``lost`` is called in that case.
    """

    _was_forked_at_work = False

    def __init__(self, lost: Callable[[], object] = lambda: None) -> None:
        self._thread: threading.Thread | _Lost | None = None
        self._lock = fork_locks.lock()
        self._lost = lost
        _all.add(self)
        if Background._was_forked_at_work:
            self._be_lost()

    def is_busy(self) -> bool:
        """Whether there is work whose result cannot be used yet."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def _be_lost(self) -> None:
        self._thread = _Lost()
        self._lost()

    @staticmethod
    def _after_fork() -> None:
        lost = [one for one in list(_all) if one._thread not in (None, threading.current_thread())]
        if lost:
            Background._was_forked_at_work = True
            fork_locks.free(dynamo_interface.compile_lock())
        for one in lost:
            one._be_lost()

    def start(self, work: Callable[[], object], conclude: Callable[[], object], device: torch.device) -> None:
        """Run ``work``, which must not raise, with this thread's grad mode, inference mode and listener. ``conclude``
        is called when the result can be used and ``is_busy()`` is False. Does nothing while other work runs.
        """
        context = contextvars.copy_context()
        is_inference, has_grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        is_ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

        def beside_others() -> None:
            with in_background():
                work()

        def run() -> None:
            try:
                run_work()
            finally:
                with self._lock:  # the next work begins after it
                    self._thread = None
                    context.run(conclude)

        def run_work() -> None:
            with torch.inference_mode(is_inference), torch.set_grad_enabled(has_grad):
                if is_ready is None:
                    context.run(beside_others)
                    return
                with torch.cuda.device(device):
                    torch.cuda.current_stream().wait_event(is_ready)
                    context.run(beside_others)
                    # The result may be used on another stream. Synchronizing the whole device would make
                    # another thread's capture of a CUDA graph invalid.
                    torch.cuda.current_stream().synchronize()

        with self._lock:
            if not self.is_busy() and not Background._was_forked_at_work:
                self._thread = threading.Thread(target=run, name="onlinequant-background", daemon=True)
                _threads.add(self._thread)
                self._thread.start()


fork_locks.in_child(Background._after_fork)


def _wait_at_exit() -> None:
    for thread in list(_threads):
        if thread.is_alive():
            _log.info("compiling is not finished; the process exits when it is")
            thread.join()


# Callbacks run in reverse order of registration: this one runs before the executors of both modules, with which
# Inductor compiles, are shut down. ``atexit`` would run after that.
getattr(threading, "_register_atexit", atexit.register)(_wait_at_exit)
