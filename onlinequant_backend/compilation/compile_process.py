"""Another process that compiles, so that this one goes on sampling: a compile holds Python's lock most of the time.

It leaves what it has compiled in the caches on disk, where this process finds it within seconds. Whatever goes wrong
costs no more than that: then this process compiles itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .. import fork_locks
from ..torch_internals import torch_settings

_log = logging.getLogger("onlinequant")
# Seconds without work after which it ends: its start takes some, but it has half a gigabyte of a GPU. This process may
# time layers that long between two pieces of work.
IDLE = 30.0
# The same after the last piece of work, when steps in 8 bit may need that memory.
IDLE_AT_THE_END = 5.0


class CompileProcessError(Exception):
    """The other process could not do its work; the message says why."""


class WorkFailedError(CompileProcessError):
    """The other process has tried, and this one would most likely fail as well."""


class CompileProcess:
    """One such process, which is started with the first work and again after its end. It does one thing at a time."""

    def __init__(self) -> None:
        self._lock = fork_locks.lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, function: Callable[..., Any], *args: Any, idle: float = IDLE_AT_THE_END) -> Any:
        """``function(*args)``, done there; both must pickle. Raises CompileProcessError where that fails.

        ``idle``: for how many seconds it waits for more work afterwards.
        """
        try:
            work = pickle.dumps((torch_settings.settings(), function, args, idle))
        except Exception as error:
            raise CompileProcessError(f"{type(error).__name__}: {error}") from error
        with self._lock:
            try:
                reply = self._ask(work) or self._ask(work)  # it may have ended just now, with nothing to do
            except OSError as error:
                raise CompileProcessError(f"it cannot be started: {error}") from error
        if reply is None:
            raise CompileProcessError("it has ended without an answer")
        result, trouble = pickle.loads(reply)
        if trouble is not None:
            raise WorkFailedError(trouble)
        return result

    def stop(self) -> None:
        """End it, whatever it is doing. The next work starts another one."""
        process = self._process
        if process is not None:
            process.kill()

    def forget(self) -> None:
        """Leave it to the process that this one was forked from."""
        self._process = None

    def _ask(self, work: bytes) -> bytes | None:
        process = self._process
        if process is None or process.poll() is not None:
            self._close()
            process = self._process = _started()
        assert process.stdin is not None and process.stdout is not None
        reply = None
        with contextlib.suppress(OSError):
            send(process.stdin, work)
            reply = receive(process.stdout)
        if reply is None:
            process.kill()  # its pipes are closed a moment before it has ended
            process.wait()
        return reply

    def _close(self) -> None:
        """Let go of the pipes of one that has ended."""
        if self._process is not None:
            for pipe in filter(None, (self._process.stdin, self._process.stdout)):
                with contextlib.suppress(OSError):  # nobody reads the rest
                    pipe.close()


def _started() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "onlinequant_backend.compilation.compile_worker"]
    _log.debug("starting %s", command)
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    threading.Thread(target=_log_lines, args=(process.stderr,), name="onlinequant-compile-log", daemon=True).start()
    return process


def _log_lines(stream: IO[bytes]) -> None:
    """What it says is for whoever looks for a fault; what a user must know comes with its answers."""
    with stream:
        for line in stream:
            _log.debug("the process that compiles: %s", line.decode(errors="replace").rstrip())


def send(stream: IO[bytes], message: bytes) -> None:
    """Write a message, with its length before it."""
    stream.write(len(message).to_bytes(8, "little") + message)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """The next message; None at the end of the stream."""
    length = int.from_bytes(stream.read(8), "little")
    message = stream.read(length)
    return message if length and len(message) == length else None


_process = CompileProcess()
fork_locks.in_child(_process.forget)
_in_background: contextvars.ContextVar[bool] = contextvars.ContextVar("onlinequant_in_background", default=False)


@contextlib.contextmanager
def in_background() -> Iterator[None]:
    """Within the block, this thread works beside others that must not wait for it."""
    token = _in_background.set(True)
    try:
        yield
    finally:
        _in_background.reset(token)


def done_elsewhere(function: Callable[..., Any], *args: Any, idle: float = IDLE_AT_THE_END) -> bool:
    """Whether ``function(*args)``, which only fills caches on disk, was done by the other process. Raises
    WorkFailedError if it has tried. ``idle``: see ``CompileProcess.run``."""
    if not is_wanted():
        return False
    try:
        _process.run(function, *args, idle=idle)
    except WorkFailedError:
        raise
    except CompileProcessError as error:
        _log.info("this process compiles itself, since another one could not: %s", error)
        return False
    return True


def is_wanted() -> bool:
    """Whether the other process is to do what it can: not for a thread that others wait for anyway."""
    return _in_background.get() and is_possible()


def is_possible() -> bool:
    """Whether there is a Python to start: a program may have it built in."""
    return Path(sys.executable or "").name.lower().startswith("python")
