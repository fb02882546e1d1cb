"""Whatever the disk does, the model runs in 8 bit, with one warning where something is lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import onlinequant_backend as oq
from onlinequant_backend.cache import cache_store
from onlinequant_backend.compilation import build
from onlinequant_backend.quantization import layer_state
from onlinequant_backend.torch_internals import inductor_interface
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.model_process import ModelProcess
from tests.helpers.small import (
    CLOSE,
    FOUND,
    MADE,
    WIDE,
    X,
    cache_directory,
    compiled,
    entries,
    forget_everything,
    is_locked,
    outcome,
    run,
    small,
)
from tests.helpers.tiny import relative_error


@pytest.fixture(autouse=True)
def inductor(inductor: EagerInductor) -> Iterator[EagerInductor]:
    forget_everything()
    with torch.no_grad():
        yield inductor


def assert_warned_once(messages: Sequence[str], why: str) -> None:
    (message,) = messages
    assert why in message


def refuse_writes(monkeypatch: pytest.MonkeyPatch, root: Path, code: int) -> None:
    """Whatever would change something below ``root`` fails: unlike permissions, this stops root, too."""

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *arguments: Any, **options: Any) -> Any:
            only_reads = function is os_open and not arguments[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            is_there = function is mkdir and os.path.lexists(path)
            if str(path).startswith(str(root)) and not only_reads and not is_there:
                raise OSError(code, os.strerror(code), str(path))
            return function(path, *arguments, **options)

        return wrapped

    mkdir, os_open = os.mkdir, os.open
    for name in ("mkdir", "open", "rename", "replace", "unlink", "rmdir", "utime"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EIO], ids=os.strerror)
def test_a_disk_that_cannot_be_written(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        refuse_writes(patch, cache_directory(), code)
        assert outcome(run(small())) == MADE
        assert outcome(run(small(seed=1), WIDE)) == MADE
    assert_warned_once(caplog.messages, os.strerror(code))
    assert oq.reports()[-1].stats_path is None
    assert not cache_directory().exists()


def test_a_warm_directory_that_can_only_be_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = run(small()).key
    forget_everything()
    refuse_writes(monkeypatch, cache_directory(), errno.EROFS)
    for x in (X, WIDE):
        assert outcome(run(small(), x)) == FOUND
        torch._dynamo.reset()
    assert_warned_once(caplog.messages, os.strerror(errno.EROFS))
    assert [entry.name for entry in entries()] == [key]


def test_a_disk_that_is_full_when_the_entry_is_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    model = small()
    assert outcome(run(model)) == MADE
    run(model, WIDE)
    assert_warned_once(caplog.messages, os.strerror(errno.ENOSPC))
    assert entries() == list(cache_directory().glob("temporary/*")) == []
    assert not is_locked()


def test_an_unforeseen_failure_to_save(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(layer_state.Layer, "save", fail)
    model = small()
    assert outcome(run(model)) == MADE
    run(model, WIDE)
    assert_warned_once(caplog.messages, "unforeseen")
    assert not is_locked()


def test_no_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_such_user(_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", no_such_user)
    for name in (*cache_store.ENVIRONMENT_VARIABLES, "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    model = small()
    assert outcome(run(model)) == MADE
    run(model, WIDE)
    assert_warned_once(caplog.messages, "let ONLINEQUANT_CACHE_DIR name a directory")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["observing", "compiling", "running"])
def test_a_directory_that_is_deleted_is_made_again(
    when: str, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = small()
    step = compiled(model)
    step(X)
    if when == "observing":
        shutil.rmtree(cache_directory())
    elif when == "compiling":
        deleting = lambda *given, **named: shutil.rmtree(cache_directory()) or inductor(*given, **named)  # noqa: E731
        monkeypatch.setattr(inductor_interface, "compile_fx", deleting)
    for _ in range(2):
        assert relative_error(step(X), model(X)) < CLOSE
    monkeypatch.setattr(inductor_interface, "compile_fx", inductor)
    if when == "running":
        shutil.rmtree(cache_directory())
    errors = [relative_error(step(WIDE), model(WIDE)) for _ in range(2)]  # the first may have been done again in float
    assert max(errors) < CLOSE
    assert errors[1] > 0
    assert [report.phase for report in oq.reports()] == ["quantized"] * 2
    assert len(entries()) == 1 + (when != "running")
    assert not caplog.records
    assert not is_locked()
    forget_everything()
    assert outcome(run(small())) == FOUND


@pytest.mark.parametrize(("what", "why"), [("a file", "File exists"), ("unsafe", "chmod 700")])
def test_a_directory_that_turns_into_something_else(what: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    step = compiled(model)
    step(X)
    if what == "a file":
        shutil.rmtree(cache_directory())
        cache_directory().touch()
    else:
        cache_directory().chmod(0o777)
    for _ in range(2):
        picture = step(X)
    assert 0 < relative_error(picture, model(X)) < CLOSE
    assert oq.reports()[-1].phase == "quantized"
    assert_warned_once(caplog.messages, why)
    assert not entries()


def test_a_disk_that_is_full_when_inductor_writes(
    inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = []

    def compile_fx(*given: Any, **named: Any) -> Any:
        folders.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        if cache_directory() in folders[-1].parents:
            monkeypatch.setattr(build, "_can_be_written", lambda directory: directory != folders[0])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return inductor(*given, **named)

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")  # the choice of conftest.py
    monkeypatch.setattr(inductor_interface, "compile_fx", compile_fx)
    key = run(small()).key
    inside, outside = folders
    assert inside == cache_directory() / "inductor" / (key[:16] + key[32:48])
    assert outside.is_dir()
    assert_warned_once(caplog.messages, "in a temporary directory")


def test_inductor_loses_its_directory(tmp_path: Path) -> None:
    """The real one, in a process of its own, for which conftest.py has chosen no directory."""
    with ModelProcess(tmp_path.resolve() / "cache", model="small", inductor=True) as process:
        process.ask("lose_directory")
        for calls in (1, 2):
            assert process.ask("call", *X.shape)["calls_observed"] == calls
        answer = process.ask("call", *X.shape)
    assert answer["phase"] == "quantized"
    assert 0 < relative_error(torch.tensor(answer["picture"]), small()(X)) < CLOSE
    assert_warned_once(process.warnings, "in a temporary directory")
