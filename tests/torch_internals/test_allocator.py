"""Memory without gaps: when the setting is on, and on a GPU what it does."""

from __future__ import annotations

import sys

import pytest
import torch

from onlinequant_backend.torch_internals import allocator
from onlinequant_backend.torch_internals.allocator import compact_memory

GPU = torch.device("cuda", 0)
MIB = 2**20


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that was set, the last one last."""
    found = [""]
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: found[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(f"{found[-1]}, emptied"))
    monkeypatch.setattr(sys, "platform", "linux")
    return found


def test_it_is_on_within_the_outermost_block(settings: list[str]) -> None:
    with compact_memory(GPU):
        assert settings[-1] == "expandable_segments:True"
        with pytest.raises(ValueError, match="inner"), compact_memory(GPU):
            raise ValueError("inner")
        assert settings.count("expandable_segments:False") == 0
    assert settings[-2:] == ["expandable_segments:False", "expandable_segments:False, emptied"]


def test_once_more_after_it_was_off(settings: list[str]) -> None:
    settings.append("expandable_segments:False")
    with compact_memory(GPU):
        assert settings[-1] == "expandable_segments:True"


@pytest.mark.parametrize("theirs", ["max_split_size_mb:64", "backend:cudaMallocAsync", "expandable_segments:True"])
def test_what_the_user_has_set_stays(theirs: str, settings: list[str]) -> None:
    settings.append(theirs)
    with compact_memory(GPU):
        pass
    assert settings == ["", theirs]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_an_older_torch_tells_only_by_the_environment(
    name: str, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings")
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    with compact_memory(GPU):
        assert settings[-1] == "expandable_segments:True"
    del settings[1:]
    monkeypatch.setenv(name, "max_split_size_mb:64")
    with compact_memory(GPU):
        assert settings == [""]


def test_nothing_is_set_elsewhere(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with compact_memory(torch.device("cpu")):
        pass
    monkeypatch.setattr(sys, "platform", "win32")
    with compact_memory(GPU):
        pass
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator.parts, "lacks", lambda purpose: purpose == allocator.parts.COMPACT_MEMORY)
    with compact_memory(GPU):
        pass
    assert settings == [""]


@pytest.mark.parametrize(("reserved", "frees"), [(1000 * MIB + 2**27, False), (1000 * MIB + 2**27 + 1, True)])
def test_many_free_pages_are_given_back_in_between(
    reserved: int, frees: bool, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = {"reserved_bytes": {"all": {"current": reserved}}, "allocated_bytes": {"all": {"peak": 1000 * MIB}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    with compact_memory(GPU) as trim:
        trim()
        assert (settings[-1] == "expandable_segments:True, emptied") == frees
    settings[:] = ["max_split_size_mb:64"]
    with compact_memory(GPU) as trim:
        trim()
    assert settings == ["max_split_size_mb:64"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_there_are_no_gaps_on_a_gpu() -> None:
    if allocator._settings() not in ("", "expandable_segments:False"):
        pytest.skip("the allocator has settings")

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
