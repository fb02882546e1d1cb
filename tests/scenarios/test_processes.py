"""Several real processes on one cache directory: one calibrates and compiles, the others wait for it and find it done.

What a process does next is decided by what others have said, never by the clock.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.model_process import ModelProcess
from tests.helpers.small import CLOSE, small
from tests.helpers.tiny import net, noise, relative_error

SMALL, WIDE = (1, 4, 8, 8), (2, 4, 12, 8)
WAITING = "waiting for another process that is calibrating this model"

Start = Callable[..., ModelProcess]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path.resolve() / "cache"


@pytest.fixture
def start(cache: Path) -> Iterator[Start]:
    """Starts a process on the cache; none of them outlives the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **given: stack.enter_context(ModelProcess(cache, **given))


def error(answer: dict[str, Any], *shape: int, seed: int = 0, model: Callable[[int], nn.Module] = net) -> float:
    """Relative error of a picture; exactly 0 while observing."""
    with torch.no_grad():
        return relative_error(torch.tensor(answer["picture"]), model(seed)(noise(*shape)))


def quantize(process: ModelProcess, *shape: int) -> dict[str, Any]:
    """Call the model until it runs in 8 bit; the last answer."""
    answer = process.ask("call", *shape)
    while answer["phase"] == "calibrating":
        answer = process.ask("call", *shape)
    if answer["phase"] == "float":  # the first one may not fit the ranges
        answer = process.ask("call", *shape)
    assert answer["phase"] == "quantized"
    return answer


def caches(answer: dict[str, Any]) -> dict[str, int]:
    """Hits, misses and the like of Inductor's two caches."""
    return {name: count for name, count in answer["caches"].items() if "_cache_" in name and "saved" not in name}


def test_four_cold_processes_compile_once_and_a_later_one_not_at_all(start: Start, cache: Path) -> None:
    """With the real Inductor, whose caches the processes share."""
    given: dict[str, Any] = {"model": "small", "inductor": True}
    first, *others = (start(**given) for _ in range(4))
    answer = first.ask("call", *SMALL)
    assert (answer["calls_observed"], error(answer, *SMALL, model=small)) == (1, 0)
    for process in others:
        process.tell("call", *SMALL)
    for process in others:
        process.await_log(WAITING)
    made = quantize(first, *SMALL)
    assert (made["calls_observed"], made["cache_hit"]) == (2, False)
    assert caches(made) == {"autograd_cache_miss": 1, "fxgraph_cache_miss": 1}
    assert 0 < error(made, *SMALL, model=small) < CLOSE
    found = [process.answer() for process in others]
    first.kill()
    found.append(start(new_interpreter=True, **given).ask("call", *SMALL))
    for answer in found:
        assert (answer["phase"], answer["calls_observed"], answer["cache_hit"]) == ("quantized", 0, True)
        assert caches(answer) == {"autograd_cache_hit": 1, "fxgraph_cache_hit": 1}
        assert answer["picture"] == made["picture"]
        assert answer["key"] == made["key"]
    folder = cache / "inductor" / (made["key"][:16] + made["key"][32:48])
    assert {"fxgraph", "aotautograd"} <= {path.name for path in folder.iterdir()}
    assert list(folder.rglob("*.so"))
    assert [path.name for path in (cache / "entries").iterdir()] == [made["key"]]


def test_processes_that_begin_at_once_calibrate_once(start: Start, cache: Path) -> None:
    processes = [start() for _ in range(4)]
    for process in processes:
        for _ in range(3):
            process.tell("call", *SMALL)
    answers = [[process.answer() for _ in range(3)] for process in processes]
    observed = collections.Counter(last["calls_observed"] for _, _, last in answers)
    assert observed == {2: 1, 0: 3}
    for calls in answers:
        assert calls[-1]["phase"] == "quantized"
        assert calls[-1]["cache_hit"] == (calls[-1]["calls_observed"] == 0)
        assert 0 < error(calls[-1], *SMALL) < CLOSE
    # The same calibration to the bit, restored or not.
    assert len({str(calls[-1]["picture"]) for calls in answers}) == 1
    assert len(list((cache / "entries").iterdir())) == 1


def test_the_death_of_a_calibrating_process_lets_the_next_one_take_over(start: Start) -> None:
    holder, *waiting = (start() for _ in range(3))
    assert holder.ask("call", *SMALL)["calls_observed"] == 1
    for process in waiting:
        process.tell("call", *SMALL)
    for process in waiting:
        process.await_log(WAITING)
    holder.kill()
    for process in waiting:
        process.tell("call", *SMALL)
        process.tell("call", *SMALL)
    last = [[process.answer() for _ in range(3)][-1] for process in waiting]
    assert sorted(answer["calls_observed"] for answer in last) == [0, 2]
    assert sorted(answer["cache_hit"] for answer in last) == [False, True]
    assert all(answer["phase"] == "quantized" and error(answer, *SMALL) < CLOSE for answer in last)


def test_a_process_that_has_waited_for_long_enough_goes_on_alone(start: Start) -> None:
    holder, waiting = start(), start(lock_timeout=1)
    assert holder.ask("call", *SMALL)["calls_observed"] == 1
    answer = quantize(waiting, *SMALL)
    assert (answer["calls_observed"], answer["cache_hit"]) == (2, False)
    assert error(answer, *SMALL) < CLOSE
    assert sum("for over 1 s" in message for message in waiting.logged) == 1
    # It waits once, not again before it compiles, and not for its next shape either.
    quantize(waiting, *WIDE)
    assert sum(message.startswith(f"{WAITING}:") for message in waiting.logged) == 1
    assert quantize(holder, *SMALL)["calls_observed"] == 2


def test_a_new_process_with_another_resolution_calibrates_nothing(start: Start, cache: Path) -> None:
    made = quantize(start(), *SMALL)
    process = start()
    process.ask("call", *WIDE)  # the first of a size looks for drift, and may be in float
    answer = process.ask("call", *WIDE)
    assert (answer["phase"], answer["calls_observed"], answer["cache_hit"]) == ("quantized", 0, True)
    assert 0 < error(answer, *WIDE) < CLOSE
    assert answer["key"] != made["key"] and answer["key"][:48] == made["key"][:48]
    assert {path.name for path in (cache / "entries").iterdir()} == {made["key"], answer["key"]}


def test_another_checkpoint_calibrates_and_does_not_wait(start: Start) -> None:
    first, other = start(), start(seed=1, lock_timeout=2)
    assert first.ask("call", *SMALL)["calls_observed"] == 1
    answer = quantize(other, *SMALL)
    assert (answer["calls_observed"], answer["cache_hit"], answer["stats_path"] is not None) == (2, False, True)
    assert 0 < error(answer, *SMALL, seed=1) < CLOSE
    assert not any("another process" in message for message in other.logged)


def test_a_fused_lora_is_calibrated_by_the_next_process(start: Start, cache: Path) -> None:
    """Weights that were changed after calibrating have no entry, also not when a new shape comes."""
    first, second = start(), start()
    made = quantize(first, *SMALL)
    first.ask("fuse")
    answer = quantize(first, *WIDE)
    assert answer["stats_path"] is None
    assert [path.name for path in (cache / "entries").iterdir()] == [made["key"]]
    second.ask("fuse")
    answer = second.ask("call", *SMALL)
    assert (answer["calls_observed"], answer["cache_hit"]) == (1, False)
    assert answer["key"][16:32] != made["key"][16:32]


def test_a_model_that_is_dropped_while_calibrating_lets_others_go_on(start: Start) -> None:
    first, second = start(), start(lock_timeout=2)
    assert first.ask("call", *SMALL)["calls_observed"] == 1
    first.ask("drop")
    answer = quantize(second, *SMALL)
    assert answer["calls_observed"] == 2
    assert not any("another process" in message for message in second.logged)
