from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from onlinequant_backend import progress
from onlinequant_backend.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    # The module's own name for sys, because pytest puts the real standard error back when a test begins.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=terminal))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return terminal


class Log(logging.Handler):
    """Everything that is logged, as plain messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[Log]:
    handler, logger = Log(), logging.getLogger("onlinequant")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_quick_work_says_nothing_in_the_log(clock: Clock, log: Log) -> None:
    with Progress("measuring", 3) as bar:
        for _ in range(3):
            clock.now += 0.1
            bar.advance()
    assert log.messages == []


def test_quick_work_says_nothing_on_a_terminal(clock: Clock, terminal: Terminal) -> None:
    with Progress("measuring", 3) as bar:
        for _ in range(3):
            clock.now += 0.1
            bar.advance()
    assert terminal.getvalue() == ""


def test_the_log_gets_one_line_for_each_tenth(clock: Clock, log: Log) -> None:
    bar = Progress("measuring layer", 100)
    for index in range(100):
        clock.now += 1
        bar.advance(f"conv_{index}")
    bar.close()
    assert log.messages[0] == "measuring layer 1 of 100 conv_0 (1 s)"
    assert log.messages[1] == "measuring layer 11 of 100 conv_10 (11 s, about 90 s left)"
    assert log.messages[-1] == "measuring layer: 100.0 s in all"
    assert len(log.messages) == 11


def test_the_log_gets_at_most_one_line_in_five_seconds(clock: Clock, log: Log) -> None:
    bar = Progress("measuring layer", 10)
    for _ in range(10):
        clock.now += 1
        bar.advance()
    assert log.messages == ["measuring layer 1 of 10 (1 s)", "measuring layer 6 of 10 (6 s, about 5 s left)"]


def test_work_of_unknown_length_logs_ever_more_rarely(clock: Clock, log: Log) -> None:
    bar = Progress("compiling")
    for _ in range(300):
        clock.now += 1
        bar.advance()
    bar.close()
    shown = [f"compiling ({seconds} s)" for seconds in (1, 6, 12, 24, 48, 96, 192)]
    assert log.messages == [*shown, "compiling: 300.0 s in all"]


def test_a_terminal_shows_one_line_that_is_redrawn_and_taken_away(clock: Clock, terminal: Terminal) -> None:
    bar = Progress("observing call", 4)
    for _ in range(2):
        clock.now += 1
        bar.advance("text")
    shown = terminal.getvalue()
    assert "observing call 2 of 4" in shown
    assert "━" * 15 in shown and "text" in shown
    assert "\n" not in shown and shown.endswith("\r")
    bar.close()
    assert terminal.getvalue()[len(shown) :] == "\r\x1b[2K"


def test_a_long_text_stays_on_its_line(clock: Clock, terminal: Terminal) -> None:
    bar = Progress("observing", 4)
    clock.now += 1
    bar.advance("x" * 500)
    assert "…" in terminal.getvalue() and "\n" not in terminal.getvalue()


def test_a_terminal_gets_no_log_lines(clock: Clock, terminal: Terminal, log: Log) -> None:
    with Progress("compiling") as bar:
        clock.now += 60
        bar.advance()
    assert log.messages == []


def test_without_a_standard_error_it_logs(clock: Clock, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=None))
    bar = Progress("observing", 4)
    clock.now += 1
    bar.advance()
    assert log.messages == ["observing 1 of 4 (1 s)"]


def test_in_a_with_block_time_goes_on_by_itself(clock: Clock, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAW", 0.01)
    with Progress("compiling"):
        clock.now += 7
        deadline = time.monotonic() + 10
        while not log.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    assert log.messages == ["compiling (7 s)", "compiling: 7.0 s in all"]


def test_an_error_in_a_with_block_gets_through_and_ends_the_thread() -> None:
    with pytest.raises(RuntimeError, match="broken"), Progress("compiling"):
        raise RuntimeError("broken")
    assert not [thread for thread in threading.enumerate() if thread.name == "onlinequant-progress"]


def test_outside_a_with_block_there_is_no_thread_to_forget() -> None:
    before = threading.active_count()
    Progress("observing", 20).advance()
    assert threading.active_count() == before


def test_closing_twice_is_closing_once(clock: Clock, log: Log) -> None:
    bar = Progress("observing", 2)
    clock.now += 1
    bar.advance()
    bar.close()
    bar.close()
    bar.advance()
    assert log.messages == ["observing 1 of 2 (1 s)", "observing: 1.0 s in all"]


def test_a_terminal_gets_a_closing_line(terminal: Terminal, clock: Clock, without_logging: None) -> None:
    bar = Progress("observing", 2)
    clock.now += 1
    bar.advance()
    shown = len(terminal.getvalue())
    progress.tell("UNet: quantized: 38 of 83 [layers] in int8")
    progress.tell("for listeners", is_result=False)
    assert terminal.getvalue()[shown:] == "\r\x1b[2KUNet: quantized: 38 of 83 [layers] in int8\n"


def test_a_closing_line_that_the_log_shows_is_not_repeated(terminal: Terminal, log: Log) -> None:
    progress.tell("UNet: quantized: 38 of 83 layers in int8")
    assert terminal.getvalue() == ""


@pytest.fixture
def without_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not configured logging, in which nobody would see what is logged."""
    monkeypatch.setattr(progress, "_log", logging.Logger("onlinequant"))  # noqa: LOG001, on the shared one pytest has handlers
    progress._unfinished.clear()


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A standard error that is no terminal."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=file))
    return file


def test_without_a_terminal_and_a_log_slow_work_writes_a_few_lines(
    clock: Clock, file: io.StringIO, without_logging: None
) -> None:
    progress.tell("nobody has waited for this")
    bar = Progress("compiling")
    for _ in range(66):
        clock.now += 1
        bar.advance()
    bar.close()
    progress.tell("UNet: quantized: 38 of 83 layers in int8")
    progress.tell("told once")
    shown = [f"compiling ({seconds} s)" for seconds in (5, 10, 20, 40)]
    assert file.getvalue().splitlines() == [
        *shown,
        "compiling: 66.0 s in all",
        "UNet: quantized: 38 of 83 layers in int8",
    ]


def test_work_of_a_few_seconds_writes_nothing(clock: Clock, file: io.StringIO, without_logging: None) -> None:
    bar = Progress("compiling")
    clock.now += 4
    bar.advance()
    bar.close()
    progress.tell("UNet: quantized: 38 of 83 layers in int8")
    assert file.getvalue() == ""


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_whoever_has_configured_logging_decides(
    clock: Clock, file: io.StringIO, without_logging: None, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    monkeypatch.setattr(progress, "_log", logging.Logger("onlinequant", level))  # noqa: LOG001
    bar = Progress("compiling")
    clock.now += 60
    bar.advance()
    bar.close()
    assert file.getvalue() == ""


def test_a_listener_is_told_everything_at_once_and_nobody_else(
    clock: Clock, terminal: Terminal, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[progress.Update] = []
    with progress.told_to(told.append):
        bar = Progress("observing", 4)
        clock.now += 1
        bar.advance()
        clock.now += 5
        bar.advance(to=4)
        progress.tell("done")
    bar.advance("later", to=2)  # work that many calls share keeps its listener
    bar.close()
    assert told == [
        progress.Update("observing 1 of 4 (1 s)", "observing", 1, 4, 1.0),
        progress.Update("observing 4 of 4 (6 s, about 2 s left)", "observing", 4, 4, 6.0, pytest.approx(5 / 3)),
        progress.Update("done"),
        progress.Update("observing 2 of 4 later (6 s, about 15 s left)", "observing", 2, 4, 6.0, 15.0),
    ]
    assert (terminal.getvalue(), log.messages) == ("", [])


def test_a_listener_hears_from_the_thread_in_a_with_block(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAW", 0.01)
    told: list[progress.Update] = []
    with progress.told_to(told.append), Progress("compiling"):
        assert [update.text for update in told] == ["compiling (0 s)"]
        clock.now += 3
        deadline = time.monotonic() + 10
        while len(told) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert told[-1].text == "compiling (3 s)"


def test_work_that_is_joined_in_the_middle(clock: Clock) -> None:
    """As a ControlNet's that begins at the eighth of twenty steps."""
    told: list[progress.Update] = []
    with progress.told_to(told.append):
        bar = Progress("observing", 20)
        for step in (8, 9, 10):
            bar.advance(to=step)
            clock.now += 10
    assert [update.left for update in told] == [None, 120, 110]


@pytest.mark.parametrize(
    ("elapsed", "shown"),
    [
        (0, "compiling (0 s, about 4 min left)"),
        (150, "compiling (150 s, about 90 s left)"),
        (152, "compiling (152 s, about 90 s left)"),
        (231, "compiling (231 s, about 9 s left)"),
        (239.5, "compiling (240 s, about 1 s left)"),
        (240, "compiling (240 s)"),
        (400, "compiling (400 s)"),
    ],
)
def test_what_is_left_of_work_that_should_take_four_minutes(clock: Clock, elapsed: float, shown: str) -> None:
    told: list[progress.Update] = []
    with progress.told_to(told.append):
        bar = Progress("compiling", expected=240)
        clock.now += elapsed
        bar.advance()
    assert told[0].text == shown
    assert told[0].left == (None if elapsed >= 240 else pytest.approx(240 - elapsed))
