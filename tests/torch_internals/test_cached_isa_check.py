from __future__ import annotations

from pathlib import Path

import pytest
from torch._inductor import cpu_vec_isa

from onlinequant_backend.torch_internals import cached_isa_check, parts
from onlinequant_backend.torch_internals.inductor_interface import inductor_cache


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What torch will find out; an answer is gone when it was asked for."""
    given: list[bool] = []
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda *_: given.pop(0))
    return given


def test_what_works_is_asked_once(tmp_path: Path, answers: list[bool]) -> None:
    answers += [True, True]
    instructions = cpu_vec_isa.VecAVX2()
    for _ in range(2):
        with cached_isa_check.asked_once(tmp_path):
            assert instructions.check_build("")
    assert answers == [True]
    with cached_isa_check.asked_once(tmp_path):
        assert cpu_vec_isa.VecAVX512().check_build("")  # others are others
    assert answers == [] and len(list(tmp_path.iterdir())) == 2


def test_other_programs_for_the_same_flags_are_asked(tmp_path: Path, answers: list[bool]) -> None:
    answers += [True, False]
    with cached_isa_check.asked_once(tmp_path):
        assert cpu_vec_isa.VecAMX().check_build("avx")
        assert not cpu_vec_isa.VecAMX().check_build("amx")
    assert answers == []


def test_what_does_not_work_is_asked_again(tmp_path: Path, answers: list[bool]) -> None:
    answers += [False, True]
    for expected in (False, True):
        with cached_isa_check.asked_once(tmp_path):
            assert cpu_vec_isa.VecAVX2().check_build("") == expected


def test_another_compiler_is_asked(tmp_path: Path, answers: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    answers += [True, True]
    for compiler in ("g++ 13", "g++ 14"):
        monkeypatch.setattr(cpu_vec_isa, "_get_isa_dry_compile_fingerprint", lambda flags, name=compiler: name + flags)
        with cached_isa_check.asked_once(tmp_path):
            assert cpu_vec_isa.VecAVX2().check_build("")
    assert answers == []


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path, answers: list[bool]) -> None:
    answers += [True]
    with cached_isa_check.asked_once(tmp_path / "none"):
        assert cpu_vec_isa.VecAVX2().check_build("")
    assert answers == []


def test_a_torch_that_asks_in_another_way_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delattr(cpu_vec_isa, "_get_isa_dry_compile_fingerprint")
    check_build = cpu_vec_isa.VecISA.check_build
    parts._absent.cache_clear()
    try:
        with inductor_cache(tmp_path, tag=""):
            assert cpu_vec_isa.VecISA.check_build is check_build
    finally:
        monkeypatch.undo()
        parts._absent.cache_clear()


def test_inductor_asks_through_this_in_a_cache_of_ours(
    tmp_path: Path, answers: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    answers += [True, True]
    for _ in range(2):
        with inductor_cache(tmp_path, tag=""):
            assert cpu_vec_isa.VecAVX2().check_build("")
    assert answers == [True]
    with inductor_cache(None, tag=""):
        assert cpu_vec_isa.VecAVX2().check_build("")
    assert answers == []
