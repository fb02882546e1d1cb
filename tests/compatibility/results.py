"""The table in docs/compatibility.md: a row for each release of torch."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
_HEAD = "| torch | Triton | Python | tests | passed | failed | skipped | seconds | date | machine |"
_LINE = "| --- | --- | --- | --- | --: | --: | --: | --: | --- | --- |"


@dataclasses.dataclass(frozen=True)
class Result:
    """One run of the tests."""

    torch: str
    triton: str
    python: str
    tests: str
    passed: int
    failed: int
    skipped: int
    seconds: int
    date: str
    machine: str

    def __str__(self) -> str:
        return f"| {' | '.join(str(value) for value in dataclasses.astuple(self))} |"

    @classmethod
    def parse(cls, row: str) -> Result:
        """The inverse of ``str``."""
        torch, triton, python, tests, *counts, date, machine = (cell.strip() for cell in row.strip("| \n").split("|"))
        return cls(torch, triton, python, tests, *map(int, counts), date, machine)

    def order(self) -> tuple[list[int], list[int]]:
        """Sorts by the version of torch, then by that of Python."""
        return _numbers(self.torch), _numbers(self.python)


def recorded(page: Path = PAGE) -> list[Result]:
    """The rows of the table."""
    return _split(page)[1]


def record(result: Result, page: Path = PAGE) -> None:
    """Add a row, in place of the one with the same versions of torch and Python."""
    before, rows, after = _split(page)
    rows = [row for row in rows if row.order() != result.order()]
    table = "".join(f"{row}\n" for row in sorted([*rows, result], key=Result.order, reverse=True))
    page.write_text(before + table + after, encoding="utf-8")


def _split(page: Path) -> tuple[str, list[Result], str]:
    """The page up to the table's first row, the rows, and the rest."""
    before, head, rest = page.read_text(encoding="utf-8").partition(f"{_HEAD}\n{_LINE}\n")
    assert head, f"{page} has no table"
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines(keepends=True)))
    return before + head, [Result.parse(line) for line in lines], rest[sum(map(len, lines)) :]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]
