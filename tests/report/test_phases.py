"""Changes of phase."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import onlinequant_backend
from onlinequant_backend import Report
from onlinequant_backend.report.phases import SHOWN, TRANSITIONS, Phase

_ROOT = Path(onlinequant_backend.__file__).parents[1]


def test_every_phase_has_its_row_and_a_word_that_the_schema_knows() -> None:
    assert TRANSITIONS.keys() == SHOWN.keys() == set(Phase)
    assert set(SHOWN.values()) == {"calibrating", "compiling", "quantized", "float"}


@pytest.mark.parametrize("before", Phase)
@pytest.mark.parametrize("after", Phase)
def test_a_phase_comes_with_its_reason_or_not_at_all(before: Phase, after: Phase) -> None:
    report = Report("Tiny")
    report._phase, report.phase, report.phase_reason = before, SHOWN[before], "before"
    is_allowed = after in TRANSITIONS[before]
    assert report.enter(after, "after") is is_allowed
    expected = (SHOWN[after], "after") if is_allowed else (SHOWN[before], "before")
    assert (report.phase, report.phase_reason) == expected


def test_what_has_failed_stays_so_until_it_is_tried_again() -> None:
    report = Report("Tiny")
    assert report.enter(Phase.FAILED, "no memory")
    for phase in (Phase.QUANTIZED, Phase.OBSERVING, Phase.COMPILING, Phase.LOADING, Phase.FLOAT):
        assert not report.enter(phase, "a call that began earlier, in another thread")
    assert (report.phase, report.phase_reason) == ("float", "no memory")
    assert report.enter(Phase.RETRYING, "again") and report.enter(Phase.QUANTIZED, "compiled")
    assert report.copy().is_in(Phase.QUANTIZED)
    assert report.enter(Phase.LOST, "forked")
    assert not any(report.enter(phase, "any") for phase in Phase)


def test_a_phase_can_be_gone_back_to() -> None:
    report = Report("Tiny")
    report.enter(Phase.OBSERVING, "observing in float")
    before = report.copy()
    report.enter(Phase.LOADING, "loading from the cache")
    assert report.enter_as(before)
    assert (report.phase, report.phase_reason) == ("calibrating", "observing in float")


def test_nothing_but_enter_assigns_a_phase() -> None:
    found = []
    for folder in ("onlinequant_backend", "comfy_integration", "passes"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                names = [each for target in targets if target is not None for each in ast.walk(target)]
                if any(isinstance(each, ast.Attribute) and each.attr in ("phase", "phase_reason") for each in names):
                    found.append(f"{path.relative_to(_ROOT)}:{node.lineno}")
    assert len(found) == 1 and found[0].startswith("onlinequant_backend/report/report.py")
