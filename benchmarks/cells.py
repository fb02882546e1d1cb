"""Cells of a table of measurements, each a process of its own that prints what it measures as JSON."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

READY = "ready to be measured"


class Cell:
    """The process that measures one cell: ``script`` with ``arguments``.

    ``enough``: the entry with which a cell is worth showing even if its process did not end well.
    """

    def __init__(
        self,
        script: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        timeout: float,
        enough: str | None = None,
    ) -> None:
        self._output: list[str] = []
        self._ending: str | None = None
        self._enough = enough
        command = [sys.executable, script, *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, errors="replace"
        )
        self._timer = threading.Timer(timeout, self._stop, [f"took more than {timeout:.0f} s"])
        self._timer.start()

    def _stop(self, ending: str) -> None:
        self._ending = ending
        self._process.kill()

    def wait_until_ready(self) -> None:
        """Until it has compiled, or failed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == READY:
                return
            self._output.append(line)

    def finish(self) -> dict[str, Any]:
        """Let it measure; a failure becomes a cell that says so, with what was measured before it."""
        rest, _ = self._process.communicate("\n")
        self._timer.cancel()
        if self._ending is None and self._process.returncode:
            self._ending = f"exit status {self._process.returncode}"
        return last_object("".join(self._output) + rest, self._ending, self._enough)


def last_object(output: str, ending: str | None, enough: str | None) -> dict[str, Any]:
    """The last whole line of a process's output that is a JSON object; ``ending``: what went wrong, if anything."""
    for line in reversed(output.splitlines()):
        try:
            cell = json.loads(line)
        except ValueError:
            continue
        if isinstance(cell, dict):
            if ending is not None:
                cell["notes"] = [*cell.get("notes", ()), ending]
                if enough not in cell:
                    cell.setdefault("failed", ending)
            return cell
    return {"failed": ending or "printed nothing"}


def caches(home: Path, is_ours: bool) -> dict[str, str]:
    """The environment in which all caches lie in the folder ``home``; ``is_ours``: of a cell that runs onlinequant."""
    home.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    environment["TRITON_HOME"] = environment["ONLINEQUANT_CACHE_DIR"] = str(home)
    if is_ours:
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # else it would take the place of onlinequant's own
    else:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(home / "inductor")
    # Older CUPTI libraries crash if they are set up again once there are CUDA graphs.
    environment.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    environment.setdefault("TEARDOWN_CUPTI", "0")
    return environment


def key_and_value(text: str) -> tuple[str, Any]:
    """``key=value``, where what is not JSON is a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def emit(cell: dict[str, Any]) -> None:
    """Print what is known of the cell so far."""
    print(json.dumps(cell), flush=True)


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
