"""What is written where the encoding is one of Windows'. Real consoles there know all characters; pipes do not."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from onlinequant_backend import progress
from onlinequant_backend.cache import listing
from onlinequant_backend.cache.cache_store import Cache
from onlinequant_backend.cache.calibration_file import STATS_FILE
from onlinequant_backend.cli import commands
from onlinequant_backend.console import accept_any_text, encodable
from onlinequant_backend.progress import Progress
from onlinequant_backend.report import NodeDecision, Report
from tests.helpers.calibrations import CALIBRATION, KEY, STATS

ENCODINGS = ["cp1252", "cp437", "ascii"]
LAYER = NodeDecision("träge.層", "conv", (1, 4, 8, 8), (8, 4, 3, 3), 9, 3, 3.0, None, None, None, False, "zu klein: ±1")


class Pipe(io.TextIOWrapper):
    """A standard output or error that is a pipe, and strict, as the standard output is."""

    def __init__(self, encoding: str, is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\r\n")
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def text(self) -> str:
        self.flush()
        self.seek(0)
        return self.read()


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Pipe]]:
    """``pipes("cp1252")``: standard output and error of that encoding."""

    def made(encoding: str, is_terminal: bool = False) -> list[Pipe]:
        both = [Pipe(encoding, is_terminal), Pipe(encoding, is_terminal)]
        for name, pipe in zip(("stdout", "stderr"), both, strict=True):
            monkeypatch.setattr(f"sys.{name}", pipe)
        return both

    return made


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_writes_to_any_pipe(encoding: str, pipes: Callable[..., list[Pipe]], tmp_path: Path) -> None:
    root = tmp_path / "快取 кэш"
    Cache.open(str(root)).publish(KEY, CALIBRATION, STATS)
    Report("UNët", key="00", decisions=[LAYER]).save(tmp_path / "saved" / STATS_FILE)
    exported, at = tmp_path / "экспорт.oq", ["--cache-dir", str(root)]
    lines = [
        ["stats", *at],
        ["stats", str(tmp_path / "saved")],
        ["stats", str(tmp_path / "не")],
        ["export", KEY[:8], str(exported), *at],
        ["stats", str(exported)],
        ["import", str(exported), *at],
        ["import", str(tmp_path / "не"), *at],
        ["clear", *at],
        ["stats", *at],
        ["doctor", *at],
    ]
    for line in lines:
        out, err = pipes(encoding)
        assert commands.main(line) in (0, 1, 2)
        assert out.text() + err.text(), line
    for line in (["--help"], ["clear", "--max-size", "größ"]):
        out, err = pipes(encoding)
        with pytest.raises(SystemExit):
            commands.main(line)
        assert "usage: onlinequant" in out.text() + err.text()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_demo_can_be_redirected(encoding: str, pipes: Callable[..., list[Pipe]], tmp_path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from onlinequant_backend.console import SIMPLE_HEAD

    (out, _) = pipes(encoding)
    accept_any_text(out)
    table = Table("", "eager", box=SIMPLE_HEAD)
    table.add_row("SSIM ± …", "1.0000")
    Console(highlight=False).print(table, f"{tmp_path}/画")
    assert "1.0000" in out.text() and "---" in out.text()


def test_tables_of_ascii_names_are_ascii(tmp_path: Path) -> None:
    """So that a user's own print of them works as well."""
    store = Cache.open(str(tmp_path / "cache"))
    store.publish(KEY, CALIBRATION, STATS)
    layer = dataclasses.replace(LAYER, name="a." * 40, reason="small " * 40)
    for table in (listing.render(store.entries()), Report("UNet", key="00", decisions=[layer]).table()):
        assert table.isascii() and "----" in table


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_progress_is_drawn_and_written_in_any_encoding(
    encoding: str, pipes: Callable[..., list[Pipe]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr(progress, "QUIET_WITHOUT_LOG", 0.0)
    monkeypatch.setattr(progress, "_is_log_configured", lambda: False)
    for is_terminal in (True, False):
        _, err = pipes(encoding, is_terminal)
        bar = Progress("observing", 2)
        bar.advance("層" * 200)
        bar.close()
        assert "observing 1 of 2" in err.text() and ("-" * 30 in re.sub(r"\x1b\[\d*m", "", err.text())) is is_terminal


def test_what_an_encoding_knows_stays() -> None:
    assert encodable("─ é …", Pipe("cp1252")) == "- é …"
    assert encodable("─ é …", Pipe("cp437")) == "─ é ..."
    assert encodable("─ é … 層", Pipe("utf-8")) == "─ é … 層" == encodable("─ é … 層", io.StringIO())
    accept_any_text(None)  # of a program without a console
    accept_any_text(io.StringIO())
