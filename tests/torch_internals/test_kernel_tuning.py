"""Kernels are measured one at a time, and once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onlinequant_backend.torch_internals import kernel_tuning

heuristics = pytest.importorskip("torch._inductor.runtime.triton_heuristics")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The tuners that were measured: the first launcher takes 1 ms, the second 2, and so on."""
    found = list[Any]()

    def measure(tuner: Any, *_args: object) -> dict[Any, float]:
        found.append(tuner)
        return {launcher: place + 1.0 for place, launcher in enumerate(tuner.launchers)}

    monkeypatch.setattr(heuristics.CachingAutotuner, "benchmark_all_configs", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_tuning, "_folders", set())
    kernel_tuning._take_over.cache_clear()
    yield found
    kernel_tuning._take_over.cache_clear()  # what it has wrapped goes with this test


def tuner_of(code: Path | None, *configs: str) -> Any:
    tuner = heuristics.CachingAutotuner.__new__(heuristics.CachingAutotuner)
    tuner.filename = None if code is None else str(code)
    # Launchers are functions, so they can be keys.
    tuner.launchers = [_Launcher(config=config) for config in configs]
    return tuner


class _Launcher(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def test_kernels_are_tuned_in_turns_of_the_thread_that_asks(measured: list[Any]) -> None:
    turns, within, second = list[str](), list[tuple[str, ...]](), threading.Event()

    @contextlib.contextmanager
    def turn(name: str) -> Iterator[None]:
        turns.append(name)
        yield
        within.append(tuple(turns))
        turns.pop()

    tuner = tuner_of(None, "XBLOCK: 1")

    def overlap() -> None:
        with kernel_tuning.tuned_in_turns(lambda: turn("other")):
            second.wait(10)
            tuner.benchmark_all_configs()

    with ThreadPoolExecutor(2) as pool:
        with kernel_tuning.tuned_in_turns(lambda: turn("this")):
            assert list(tuner.benchmark_all_configs(1, 2).values()) == [1.0]
            pool.submit(tuner.benchmark_all_configs).result()
            other = pool.submit(overlap)
        second.set()
        other.result()
    tuner.benchmark_all_configs()
    assert len(measured) == 4 and within == [("this",), ("other",)]


def test_a_kernel_is_measured_once(measured: list[Any], tmp_path: Path) -> None:
    kernel_tuning.remember_times(tmp_path)
    code = tmp_path / "fx" / "ab" / "cab.py"
    code.parent.mkdir(parents=True)
    names = ("XBLOCK: 1, R0_BLOCK: 2048", "XBLOCK: 1, R0_BLOCK: 1024")
    assert list(tuner_of(code, *names).benchmark_all_configs().values()) == [1.0, 2.0]
    again = tuner_of(code, *reversed(names))  # another process may have them in another order
    times = again.benchmark_all_configs()
    assert len(measured) == 1 and {launcher.config: time for launcher, time in times.items()} == {
        names[0]: 1.0,
        names[1]: 2.0,
    }
    tuner_of(code, *names, "XBLOCK: 4").benchmark_all_configs()  # of other configurations nothing is known
    tuner_of(code.with_name("cac.py"), *names).benchmark_all_configs()
    assert len(measured) == 3


@pytest.mark.parametrize("content", ["", "[]", '{"XBLOCK: 1": "fast"}', '{"XBLOCK: 1": 1.0, "XBLOCK: 2"', "{}"])
def test_what_cannot_be_read_is_measured_again(content: str, measured: list[Any], tmp_path: Path) -> None:
    kernel_tuning.remember_times(tmp_path)
    (tmp_path / "cab.times").write_text(content)
    for _ in range(2):
        assert list(tuner_of(tmp_path / "cab.py", "XBLOCK: 1").benchmark_all_configs().values()) == [1.0]
    assert len(measured) == 1 and [file.name for file in tmp_path.iterdir()] == ["cab.times"]


def test_other_kernels_leave_nothing_behind(measured: list[Any], tmp_path: Path) -> None:
    kernel_tuning.remember_times(tmp_path / "ours")
    for _ in range(2):
        tuner_of(tmp_path / "cab.py", "XBLOCK: 1").benchmark_all_configs()
    assert len(measured) == 2 and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_stops_nothing(measured: list[Any], tmp_path: Path) -> None:
    kernel_tuning.remember_times(tmp_path)
    for _ in range(2):
        assert tuner_of(tmp_path / "gone" / "cab.py", "XBLOCK: 1").benchmark_all_configs()
    assert len(measured) == 2
