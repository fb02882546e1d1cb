"""Python's search for garbage is put off, and comes back."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from onlinequant_backend.garbage_collection import without_garbage_collection


def test_it_comes_back_when_the_last_one_is_done() -> None:
    with without_garbage_collection():
        with without_garbage_collection(), ThreadPoolExecutor(1) as pool:
            assert not pool.submit(gc.isenabled).result()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), without_garbage_collection():
        raise KeyError
    assert gc.isenabled()


def test_what_was_off_before_stays_off() -> None:
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_has_been_made_is_old_afterwards_and_still_collected() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

    searches = list[object]()

    def note(_phase: str, details: object) -> None:
        searches.append(details)

    gc.collect()
    gc.callbacks.append(note)
    try:
        with without_garbage_collection():
            kept: list[Any] = [Cycle() for _ in range(50_000)]
        few: list[Any] = [[] for _ in range(100)]
    finally:
        gc.callbacks.remove(note)
    assert not searches and few
    assert sum(isinstance(each, Cycle) for each in gc.get_objects(generation=0)) == 0
    assert gc.get_freeze_count() == 0
    del kept
    assert gc.collect() >= 50_000


def test_what_the_program_has_frozen_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        with without_garbage_collection():
            pass
        assert gc.get_freeze_count() > frozen // 2
    finally:
        gc.unfreeze()
