"""Progress of slow work: a line that redraws itself on a terminal, a few log lines anywhere else, or a listener."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from types import TracebackType

from rich.console import Console, OverflowMethod
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from .console import encodable

_log = logging.getLogger("onlinequant")

# Seconds: work that is done sooner says nothing; a terminal's line is redrawn, a log line is due after.
QUIET, REDRAW, LOG_EVERY = 0.5, 0.5, 5.0
# Where nobody has configured logging, lines are for people who wait: from so many seconds on.
QUIET_WITHOUT_LOG = 5.0
_BAR_WIDTH = 30


@dataclass(frozen=True)
class Update:
    """What a listener is told.

    Attributes:
        text: all of it in one line, for people.
        phase: what is being done, "compiling" say; empty where slow work has ended and ``text`` says how.
        done: the number of the item that is being worked on, from 1; 0 before the first.
        total: how many items there are; None where nobody knows.
        seconds: since the phase began.
        left: seconds that it will probably take yet; None where nobody knows.
    """

    text: str
    phase: str = ""
    done: int = 0
    total: int | None = None
    seconds: float = 0.0
    left: float | None = None


Listener = Callable[[Update], None]
_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("onlinequant_listener", default=None)


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Within the block, progress goes to ``listener`` and not to the terminal or the log.

    ``listener`` is called with an ``Update``, from whatever thread: when work begins, for each of its items, and twice
    a second while one step of ours takes long. It should return soon, and must not raise.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def is_listened_to() -> bool:
    """Whether this thread's progress goes to a listener."""
    return _listener.get() is not None


def tell(text: str, *, is_result: bool = True) -> None:
    """Say how slow work has ended: to the listener if there is one, else on the terminal, or after the lines that were
    written in place of a log. The log has such a line already.

    ``is_result=False``: what only a listener wants to know.
    """
    listener, console = _listener.get(), _terminal()
    if listener is not None:
        listener(Update(text))
    elif not is_result or (_is_log_configured() and _log.isEnabledFor(logging.INFO)):
        return
    elif console is not None:
        _erase_line(console)
        console.print(text, soft_wrap=True, markup=False)
    elif _unfinished.is_set():
        _write_line(text)
        _unfinished.clear()


class Progress:
    """Shows how far work has come, ``Progress("observing", 20)``, or just for how long: ``Progress("compiling")``.

    The time left is estimated from the items that are done, or from ``expected``, the seconds that such work
    took before.

    In a ``with`` block the elapsed time goes on by itself. Outside one, as for work that many calls share, nothing
    happens between two calls of ``advance``, so it need never be closed. That is why the line is drawn here: tqdm
    starts a thread with its first bar, and rich's live display hides the cursor and redirects standard output until it
    is stopped.
    """

    def __init__(self, description: str, total: int | None = None, expected: float | None = None) -> None:
        self._description = description
        self._total = total
        self._ends = expected  # seconds after the beginning; None while nobody knows
        self._done = 0
        self._text = ""
        self._first: tuple[float, int] | None = None  # seconds and number of the first item
        self._started = monotonic()
        self._logged: tuple[float, int] | None = None  # seconds and items of the last log line
        self._listener = _listener.get()
        self._console = _terminal()
        self._drawn = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None

    def advance(self, text: str = "", to: int | None = None) -> None:
        """Begin the next item, or item number ``to``; ``text`` names it."""
        with self._lock:
            self._done = self._done + 1 if to is None else to
            self._text = text
            self._estimate()
            self._show()

    def _estimate(self) -> None:
        """From the items since the first one that was told of, which need not be the first."""
        now = self._elapsed()
        if self._first is None:
            self._first = now, self._done
        elif self._total is not None and self._done > self._first[1]:
            then, first = self._first
            self._ends = then + (now - then) * (self._total + 1 - first) / (self._done - first)

    def close(self) -> None:
        """Take the line off the terminal, or log the end of work whose beginning is in the log. Idempotent."""
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join()
            self._ticker = None
        with self._lock:
            if self._console is not None and self._drawn:
                _erase_line(self._console)
            if self._logged is not None:
                _log_line(f"{self._description}: {self._elapsed():.1f} s in all")
            self._drawn, self._logged = False, None

    def __enter__(self) -> Progress:
        with self._lock:
            self._show()
        self._ticker = threading.Thread(target=self._tick, name="onlinequant-progress", daemon=True)
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tick(self) -> None:
        while not self._closed.wait(REDRAW):
            with self._lock:
                self._show()

    def _elapsed(self) -> float:
        return monotonic() - self._started

    def _show(self) -> None:
        elapsed = self._elapsed()
        if self._closed.is_set():
            return
        if self._listener is not None:
            text, left = self._sentence(elapsed), self._left(elapsed)
            self._listener(Update(text, self._description, self._done, self._total, elapsed, left))
        elif elapsed < QUIET:
            return
        elif self._console is not None:
            _draw_line(self._console, self._line(elapsed))
            self._drawn = True
        elif self._is_log_due(elapsed):
            self._logged = elapsed, self._done
            _log_line(self._sentence(elapsed))

    def _is_log_due(self, elapsed: float) -> bool:
        if self._logged is None:
            return _is_log_configured() or elapsed >= QUIET_WITHOUT_LOG
        seconds, items = self._logged
        if elapsed - seconds < LOG_EVERY:
            return False
        if self._total is None:
            return elapsed >= 2 * seconds  # ever rarer: work of unknown length must not fill the log
        return self._done - items >= self._total / 10

    def _where(self) -> str:
        return self._description if self._total is None else f"{self._description} {self._done} of {self._total}"

    def _left(self, elapsed: float) -> float | None:
        """None, too, for what takes longer than expected: nobody knows any more."""
        return None if self._ends is None or self._ends <= elapsed else self._ends - elapsed

    def _times(self, elapsed: float) -> str:
        left = self._left(elapsed)
        return f"{elapsed:.0f} s" if left is None else f"{elapsed:.0f} s, about {_duration(left)} left"

    def _sentence(self, elapsed: float) -> str:
        return f"{' '.join(filter(None, [self._where(), self._text]))} ({self._times(elapsed)})"

    def _line(self, elapsed: float) -> Text:
        line = Text(f"{self._where()} ")
        if self._total:
            full = _BAR_WIDTH * min(self._done, self._total) // self._total
            bar = encodable("━", sys.stderr) * _BAR_WIDTH
            line.append(bar[:full], "cyan").append(bar[full:], "dim").append(" ")
        return line.append(f"{self._times(elapsed)} ", "green").append(encodable(self._text, sys.stderr), "dim")


def _duration(seconds: float) -> str:
    """No more precise than it can be known."""
    if seconds < 10:
        return f"{math.ceil(seconds)} s"
    return f"{5 * round(seconds / 5)} s" if seconds <= 90 else f"{round(seconds / 60)} min"


# Set while lines tell of slow work whose result has not been told yet.
_unfinished = threading.Event()


def _log_line(text: str) -> None:
    """Log how far slow work is. Where logging is not configured, which would drop it, it is written as tqdm would."""
    if _is_log_configured():
        _log.info("%s", text)
    else:
        _unfinished.set()
        _write_line(text)


def _is_log_configured() -> bool:
    return _log.hasHandlers() or _log.level != logging.NOTSET


def _write_line(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{encodable(text, sys.stderr)}\n")
        sys.stderr.flush()


def _terminal() -> Console | None:
    """Standard error, if it is a terminal that can redraw a line."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    console = Console(file=sys.stderr, highlight=False)
    return None if console.is_dumb_terminal else console


def _draw_line(console: Console, line: Text) -> None:
    _erase_line(console)
    # The cursor goes back to the line's beginning, so that whatever is printed next writes over it.
    overflow: OverflowMethod = "ellipsis" if encodable("…", console.file) == "…" else "crop"
    console.print(line, end="\r", no_wrap=True, overflow=overflow, width=console.width - 1)


def _erase_line(console: Console) -> None:
    console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
