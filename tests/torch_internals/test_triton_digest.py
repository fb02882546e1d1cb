"""Triton's digest is computed once, by another thread."""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable

import pytest

from onlinequant_backend.torch_internals import triton_digest


def module(digest: Callable[[], object]) -> types.ModuleType:
    made = types.ModuleType("triton.runtime.cache")
    made.__dict__["triton_key"] = digest
    return made


@pytest.fixture(autouse=True)
def nothing_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_digest, "_thread", None)


def test_another_thread_computes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    @functools.lru_cache
    def digest() -> int:
        threads.append(threading.get_ident())
        return 1

    monkeypatch.setitem(sys.modules, "triton.runtime.cache", module(digest))
    for _ in range(2):
        triton_digest.begin()
    triton_digest.wait()
    digest()
    assert len(threads) == 1 and threads != [threading.get_ident()]


def test_who_needs_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, ended = threading.Event(), list[bool]()
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", module(lambda: ended.append(may_end.wait(60))))
    triton_digest.begin()
    threading.Timer(0.05, may_end.set).start()
    triton_digest.wait()
    assert ended == [True]


def test_an_error_is_left_to_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError

    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", module(fail))
    triton_digest.begin()
    triton_digest.wait()
    assert not errors


@pytest.mark.parametrize("loaded", [None, types.ModuleType("triton.runtime.cache")], ids=["no Triton", "another one"])
def test_without_it_there_is_nothing_to_do(loaded: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", loaded)
    triton_digest.begin()
    triton_digest.wait()
