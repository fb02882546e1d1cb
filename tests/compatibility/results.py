"""The table in docs/compatibility.md: a row for each release of torch."""

from __future__ import annotations

import dataclasses
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
    _, _, rest = page.read_text(encoding="utf-8").partition(f"{_HEAD}\n{_LINE}\n")
    return [Result.parse(row) for row in rest.partition("\n\n")[0].splitlines()]


def record(result: Result, page: Path = PAGE) -> None:
    """Add a row, in place of the one with the same versions of torch and Python."""
    text = page.read_text(encoding="utf-8")
    before, head, rest = text.partition(f"{_HEAD}\n{_LINE}\n")
    assert head, f"{page} has no table"
    old, gap, after = rest.partition("\n\n")
    rows = [row for row in map(Result.parse, old.splitlines()) if row.order() != result.order()]
    table = "\n".join(map(str, sorted([*rows, result], key=Result.order, reverse=True)))
    page.write_text(f"{before}{head}{table}{gap or chr(10)}{after}", encoding="utf-8")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]
