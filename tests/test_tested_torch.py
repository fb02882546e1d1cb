"""What is said about the version of torch."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

from onlinequant_backend import tested_torch
from tests.compatibility.results import Result, record, recorded

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
TABLE = """# Page

| torch | Triton | Python | tests | passed | failed | skipped | seconds | date | machine |
| --- | --- | --- | --- | --: | --: | --: | --: | --- | --- |

More.
"""


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.13.0+cu128", "tested"),
        ("2.14.1", "tested"),
        ("2.15.0", "tested"),
        ("2.12.1", "tested"),
        ("2.15.1+cpu", "tested"),
        ("2.16.0.dev20270101", "newer than tested"),
        ("3.0.0", "newer than tested"),
        ("2.7.1", "older than tested"),
    ],
)
def test_a_version_is_compared_with_those_that_were_tested(version: str, expected: str) -> None:
    assert tested_torch.standing(version) == expected
    assert f"torch {version} is {expected}; tested: 2.11, 2.12, 2.13, 2.14, 2.15" == tested_torch.describe(version)


def test_one_line_of_the_log_says_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "onlinequant")
    tested_torch.announce()
    assert caplog.record_tuples == [("onlinequant", logging.INFO, tested_torch.describe(torch.__version__))]


def result(version: str, python: str = "3.11.7", passed: int = 5) -> Result:
    return Result(version, "3.9.0", python, "unit", passed, 0, 2, 9, "2026-12-01", "x86_64, 2 cores")


def test_a_result_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(TABLE)
    for each in (result("2.8.0"), result("2.15.0+cu132"), result("2.15.0", "3.12.1"), result("2.15.0+cu132", passed=6)):
        record(each, page)
    expected = [result("2.15.0", "3.12.1"), result("2.15.0+cu132", passed=6), result("2.8.0")]
    assert recorded(page) == expected
    assert page.read_text().startswith("# Page\n\n| torch") and page.read_text().endswith(" |\n\nMore.\n")


def test_versions_that_are_called_tested_are_in_the_table_or_pinned() -> None:
    (pinned,) = re.findall(r"^torch==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    versions = {pinned, *(row.torch for row in recorded())}
    assert {tested_torch._release(each) for each in versions} == set(map(tested_torch._release, tested_torch.TESTED))
