from __future__ import annotations

import json
from pathlib import Path

import pytest

import onlinequant_backend as oq
from onlinequant_backend.compilation.compile_times import FILE, CompileTimes
from tests.helpers.small import cache_directory, forget_everything, run, small


def test_what_was_never_compiled_is_not_foretold(tmp_path: Path) -> None:
    times = CompileTimes(tmp_path)
    assert times.expected("anew", 100) is None
    times.add("from the cache", 100, 2.0)
    assert times.expected("anew", 100) is None


def test_a_graph_of_twice_the_nodes_takes_twice_the_time(tmp_path: Path) -> None:
    CompileTimes(tmp_path).add("anew", 100, 20.0)
    assert CompileTimes(tmp_path).expected("anew", 200) == pytest.approx(40)


def test_one_compile_that_was_slow_changes_little_and_old_ones_are_forgotten(tmp_path: Path) -> None:
    times = CompileTimes(tmp_path)
    for seconds in (1.0, 1.1, 60.0):
        times.add("anew", 1, seconds)
    assert times.expected("anew", 1) == pytest.approx(1.1)
    for _ in range(20):
        times.add("anew", 1, 5.0)
    assert times.expected("anew", 1) == pytest.approx(5)
    assert len(json.loads((tmp_path / FILE).read_text())["anew"]) == 8


def test_of_many_kinds_the_latest_are_kept(tmp_path: Path) -> None:
    times = CompileTimes(tmp_path)
    times.add("old", 1, 1.0)
    for index in range(64):
        times.add(f"kind {index}", 1, 1.0)
    assert times.expected("old", 1) is None and times.expected("kind 0", 1) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"anew": 3}',
        '{"anew": ["1"]}',
        '{"anew": [-1.0]}',
        '{"anew": [Infinity]}',
        '{"anew": [1e308]}',
    ],
)
def test_a_file_that_is_broken_is_written_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    times = CompileTimes(tmp_path)
    assert times.expected("anew", 1) is None
    times.add("anew", 1, 3.0)
    assert times.expected("anew", 1) == 3


def test_without_a_cache_nothing_is_remembered() -> None:
    times = CompileTimes(None)
    times.add("anew", 1, 3.0)
    assert times.expected("anew", 1) is None


def test_a_file_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    CompileTimes(tmp_path / "file").add("anew", 1, 3.0)
    assert CompileTimes(tmp_path / "file").expected("anew", 1) is None


def test_the_next_model_is_told_by_how_long_the_last_one_took() -> None:
    took = run(small(0)).compile_seconds
    file = cache_directory() / FILE
    ((kind, [seconds]),) = json.loads(file.read_text()).items()
    assert 0 < seconds < took
    how = kind.removesuffix("anew").removesuffix("from the cache")  # whichever it was: tests share Inductor's cache
    file.write_text(json.dumps({f"{how}anew": [1000 * seconds]}))
    forget_everything()
    told: list[oq.Update] = []
    with oq.told_to(told.append):
        run(small(1))
    (first, *_) = [update for update in told if update.phase == "compiling"]
    assert first.left == pytest.approx(1000 * took, rel=0.1)
