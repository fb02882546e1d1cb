"""Compiles in another process, so that this one can continue sampling: a compile holds the GIL most of the time. The
results are in the caches on disk, from which this process loads them within seconds. If anything fails, this process
compiles itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .. import fork_locks
from ..operating_system import background_process
from ..torch_internals import torch_settings

_log = logging.getLogger("onlinequant")
# Seconds without work after which it exits: starting it takes some, but it holds half a gigabyte of GPU memory. This
# process may time layers for that long between two pieces of work.
IDLE = 30.0
# Seconds after the last piece of work, when 8-bit steps may need that memory.
IDLE_AT_THE_END = 5.0
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv.pop())
from onlinequant_backend.compilation.compile_worker import main
main()
"""


class CompileProcessError(Exception):
    """The other process could not do its work; the message says why."""


class WorkFailedError(CompileProcessError):
    """The other process ran the work and failed; this one would most likely fail as well."""


class CompileProcess:
    """One such process, which is started for the first work and restarted after its exit. It does one thing at a
    time."""

    def __init__(self) -> None:
        self._lock = fork_locks.lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, function: Callable[..., Any], *args: Any, idle: float = IDLE_AT_THE_END) -> Any:
        """``function(*args)``, run in that process; both must pickle. Raises CompileProcessError if that fails.
        ``idle``: the seconds that it waits for more work afterwards.
        """
        try:
            work = pickle.dumps((torch_settings.settings(), function, args, idle))
        except Exception as error:
            raise CompileProcessError(f"{type(error).__name__}: {error}") from error
        with self._lock:
            try:
                reply = self._ask(work) or self._ask(work)  # it may have just exited for lack of work
            except OSError as error:
                raise CompileProcessError(f"it cannot be started: {error}") from error
        if reply is None:
            raise CompileProcessError("it has exited without an answer")
        result, trouble = pickle.loads(reply)
        if trouble is not None:
            raise WorkFailedError(trouble)
        return result

    def stop(self) -> None:
        """Kill the process, also during work. The next work starts another one."""
        process = self._process
        if process is not None:
            process.kill()

    def forget(self) -> None:
        """Forget the process in the child of a fork; it belongs to the parent."""
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
            process.kill()  # its pipes are closed a moment before it has exited
            process.wait()
        return reply

    def _close(self) -> None:
        """Close the pipes of a process that has exited."""
        if self._process is not None:
            for pipe in filter(None, (self._process.stdin, self._process.stdout)):
                with contextlib.suppress(OSError):  # the rest has no reader
                    pipe.close()


def _started() -> subprocess.Popen[bytes]:
    # Not in PYTHONPATH, which an embedded Python, as in ComfyUI's portable version for Windows, does not read.
    path = [str(Path(entry).absolute()) for entry in sys.path if entry]
    command = [sys.executable, "-c", _PROGRAM, json.dumps(path)]
    _log.debug("starting %s", command)
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, **background_process())
    threading.Thread(target=_log_lines, args=(process.stderr,), name="onlinequant-compile-log", daemon=True).start()
    return process


def _log_lines(stream: IO[bytes]) -> None:
    """Log the process's standard error for debugging; messages for users are part of its answers."""
    with stream:
        for line in stream:
            _log.debug("the process that compiles: %s", line.decode(errors="replace").rstrip())


def send(stream: IO[bytes], message: bytes) -> None:
    """Write a message, preceded by its length."""
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
    """Within the block, this thread works in the background: others do not wait for it."""
    token = _in_background.set(True)
    try:
        yield
    finally:
        _in_background.reset(token)


def done_elsewhere(function: Callable[..., Any], *args: Any, idle: float = IDLE_AT_THE_END) -> bool:
    """Whether the other process has run ``function(*args)``, which only fills caches on disk. Raises WorkFailedError if
    it ran and failed. ``idle``: see ``CompileProcess.run``."""
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
    """Whether to use the other process: only for background threads, for which no caller waits."""
    return _in_background.get() and is_possible()


def is_possible() -> bool:
    """Whether there is a Python executable to start: a program may embed the interpreter."""
    return Path(sys.executable or "").name.lower().startswith("python")
