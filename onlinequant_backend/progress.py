"""Progress of slow work: a line that redraws itself on a terminal, a few log lines anywhere else, or a listener."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

_log = logging.getLogger("onlinequant")

# Seconds: work that is done sooner says nothing; a terminal's line is redrawn, a log line is due after.
QUIET, REDRAW, LOG_EVERY = 0.5, 0.5, 5.0
_BAR_WIDTH = 30

Listener = Callable[[str], None]
_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("onlinequant_listener", default=None)


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Within the block, progress goes to ``listener``, from whatever thread, and not to the terminal or the log."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(text: str) -> None:
    """Tell the listener, if there is one, how slow work has ended."""
    listener = _listener.get()
    if listener is not None:
        listener(text)


class Progress:
    """Shows how far work has come, ``Progress("observing", 20)``, or just for how long: ``Progress("compiling")``.

    In a ``with`` block the elapsed time goes on by itself. Outside one, as for work that many calls share, nothing
    happens between two calls of ``advance``: no thread, no hidden cursor, so it may as well never be closed. That is
    why this draws its own line and rich's live display does not.
    """

    def __init__(self, description: str, total: int | None = None) -> None:
        self._description = description
        self._total = total
        self._done = 0
        self._text = ""
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
            self._show()

    def close(self) -> None:
        """Take the line off the terminal, or log the end of what the log has the beginning of. Twice is once."""
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join()
            self._ticker = None
        with self._lock:
            if self._console is not None and self._drawn:
                _erase_line(self._console)
            if self._logged is not None:
                _log.info("%s: %.1f s in all", self._description, self._elapsed())
            self._drawn, self._logged = False, None

    def __enter__(self) -> Progress:
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
            self._listener(self._sentence(elapsed))
        elif elapsed < QUIET:
            return
        elif self._console is not None:
            _draw_line(self._console, self._line(elapsed))
            self._drawn = True
        elif self._is_log_due(elapsed):
            self._logged = elapsed, self._done
            _log.info("%s", self._sentence(elapsed))

    def _is_log_due(self, elapsed: float) -> bool:
        if self._logged is None:
            return True
        seconds, items = self._logged
        if elapsed - seconds < LOG_EVERY:
            return False
        if self._total is None:
            return elapsed >= 2 * seconds  # ever rarer: work of unknown length must not fill the log
        return self._done - items >= self._total / 10

    def _where(self) -> str:
        return self._description if self._total is None else f"{self._description} {self._done} of {self._total}"

    def _sentence(self, elapsed: float) -> str:
        return f"{' '.join(filter(None, [self._where(), self._text]))} ({elapsed:.0f} s)"

    def _line(self, elapsed: float) -> Text:
        line = Text(f"{self._where()} ", no_wrap=True, overflow="ellipsis")
        if self._total:
            full = _BAR_WIDTH * min(self._done, self._total) // self._total
            line.append("━" * full, "cyan").append("━" * (_BAR_WIDTH - full), "dim").append(" ")
        return line.append(f"{elapsed:.0f} s ", "green").append(self._text, "dim")


def _terminal() -> Console | None:
    """Standard error, if it is a terminal that can redraw a line."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    console = Console(file=sys.stderr, highlight=False)
    return None if console.is_dumb_terminal else console


def _draw_line(console: Console, line: Text) -> None:
    _erase_line(console)
    # The cursor goes back to the line's beginning, so that whatever is printed next writes over it.
    console.print(line, end="\r", no_wrap=True, overflow="ellipsis", width=console.width - 1)


def _erase_line(console: Console) -> None:
    console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
