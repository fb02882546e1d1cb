"""Memory without gaps: when the setting is on, and on a GPU what it does."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from onlinequant_backend.torch_internals import allocator
from onlinequant_backend.torch_internals.allocator import compact_memory

GPU = torch.device("cuda", 0)
MIB = 2**20


class Allocator:
    """Notes what is set and freed; the last setting is the current one."""

    def __init__(self) -> None:
        self.set: list[str] = []
        self.settings, self.emptied, self.free, self.peak = "", 0, 0, 1000 * MIB

    def make(self, settings: str) -> None:
        self.set.append(settings)
        self.settings = settings

    def empty(self) -> None:
        self.emptied += 1

    def stats(self, device: torch.device) -> dict[str, Any]:
        allocated = {"current": 300 * MIB, "peak": self.peak}
        return {
            "reserved_bytes": {"all": {"current": 300 * MIB + self.free}},
            "allocated_bytes": {"all": allocated},
        }


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    fake = Allocator()
    monkeypatch.setattr(allocator, "_made", "")
    monkeypatch.setattr(allocator, "_works", lambda device: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", fake.make, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: fake.settings, raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", fake.empty)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", fake.stats)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(sys, "platform", "linux")
    return fake


def test_it_is_on_within_the_outermost_block(fake: Allocator) -> None:
    for _ in range(2):
        with compact_memory(GPU):
            assert fake.settings == "expandable_segments:True"
            with pytest.raises(ValueError, match="inner"), compact_memory(GPU):
                raise ValueError("inner")
            assert fake.settings == "expandable_segments:True"
    assert fake.set == ["expandable_segments:True", "expandable_segments:False"] * 2
    assert fake.emptied == 4


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "theirs", ["max_split_size_mb:64", "expandable_segments:True", "expandable_segments:True,max_split_size_mb:64"]
)
def test_what_the_user_has_set_stays(theirs: str, when: str, fake: Allocator) -> None:
    if when == "after":
        with compact_memory(GPU):
            pass
    fake.settings, fake.set = theirs, []
    with compact_memory(GPU) as trim:
        trim(2**20)
    assert fake.settings == theirs and not fake.set


def test_a_user_may_have_turned_it_off(fake: Allocator) -> None:
    fake.settings = "expandable_segments:False"
    with compact_memory(GPU):
        assert not fake.set


@pytest.mark.parametrize("theirs", ["", "max_split_size_mb:64", None])
def test_an_older_torch_tells_by_a_snapshot(
    theirs: str | None, fake: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings")
    fake.settings = theirs or ""

    def snapshot() -> dict[str, Any]:
        settings = {} if theirs is None else {"PYTORCH_CUDA_ALLOC_CONF": fake.settings}
        return {"segments": [], "allocator_settings": settings}

    monkeypatch.setattr(torch.cuda.memory, "_snapshot", snapshot)
    for _ in range(2):
        with compact_memory(GPU):
            assert (fake.settings == "expandable_segments:True") == (theirs == "")


@pytest.mark.parametrize("where", ["a CPU", "Windows", "another torch", "cudaMallocAsync", "a driver without them"])
def test_nothing_is_set_elsewhere(where: str, fake: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "Windows":
        monkeypatch.setattr(sys, "platform", "win32")
    if where == "another torch":
        monkeypatch.setattr(allocator.parts, "lacks", lambda purpose: purpose == allocator.parts.COMPACT_MEMORY)
    if where == "cudaMallocAsync":
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    if where == "a driver without them":
        monkeypatch.setattr(allocator, "_works", lambda device: False)
    with compact_memory(torch.device("cpu") if where == "a CPU" else GPU) as trim:
        trim(2**20)
    assert not fake.set and not fake.emptied


def test_a_driver_is_asked_once(fake: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(device: torch.device) -> object:
        asked.append(fake.settings)
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.undo()
    fake = Allocator()
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", fake.make, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: fake.settings, raising=False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(allocator, "_made", "")
    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    monkeypatch.setattr(sys, "platform", "linux")
    allocator._works.cache_clear()
    for _ in range(2):
        with compact_memory(GPU):
            assert fake.settings == "expandable_segments:False"
    assert asked == ["expandable_segments:True"]
    allocator._works.cache_clear()


@pytest.mark.parametrize(("peak", "allowed"), [(1000 * MIB, 128 * MIB), (3200 * MIB, 200 * MIB)])
def test_many_free_pages_are_given_back_in_between(peak: int, allowed: int, fake: Allocator) -> None:
    fake.peak = peak

    def emptied(made: int = 32 * MIB) -> int:
        before = fake.emptied
        trim(made)
        return fake.emptied - before

    with compact_memory(GPU) as trim:
        fake.free = allowed
        assert emptied() == 0
        fake.free += 1
        assert emptied(32 * MIB - 1) == 0  # after each small layer a look would take too long
        assert emptied() == 1
        assert emptied() == 0  # they could not be freed
        fake.free += allowed + 1
        assert emptied() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_larger_than_each_gap_takes_no_more_on_a_gpu() -> None:
    if not allocator._is_possible(GPU):
        pytest.skip("the allocator has settings, or there are no such segments")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with compact_memory(GPU) as trim:
        tensors = [torch.empty(100 * MIB, dtype=torch.uint8, device=GPU) for _ in range(16)]
        del tensors[::2]
        trim(100 * MIB)
        torch.empty(700 * MIB, dtype=torch.uint8, device=GPU)
    assert torch.cuda.max_memory_reserved() - before <= 1800 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_there_are_no_gaps_on_a_gpu() -> None:
    if not allocator._is_possible(GPU):
        pytest.skip("the allocator has settings, or there are no such segments")

    def reserved(is_compact: bool) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        with compact_memory(GPU if is_compact else torch.device("cpu")):
            for size in range(32, 256, 32):  # none fits into what the one before has left
                torch.empty(size * MIB, dtype=torch.uint8, device=GPU)
        most = torch.cuda.max_memory_reserved() - before
        torch.cuda.empty_cache()
        return most

    assert reserved(is_compact=False) > 800 * MIB
    assert reserved(is_compact=True) < 300 * MIB
    assert torch.empty(MIB, device=GPU).sum().item() is not None
