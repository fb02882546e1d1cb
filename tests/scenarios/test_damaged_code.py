"""Compiled code in the cache that is damaged: it is compiled anew, and what was damaged is never tried again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import onlinequant_backend as oq
from onlinequant_backend.cache import atomic_files
from onlinequant_backend.torch_internals import inductor_interface
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.model_process import ModelProcess
from tests.helpers.small import CLOSE, WIDE, X, cache_directory, compiled, forget_everything, small
from tests.helpers.tiny import net, relative_error


class Generating(EagerInductor):
    """Keeps a generated file for all that it compiles, and fails with one that is damaged, as Inductor does."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts = 0

    def __call__(self, *given: Any, **named: Any) -> Callable[..., Any]:
        self.attempts += 1
        if not code().exists():
            code().parent.mkdir(parents=True)
            code().write_text("good")
        if code().read_text() != "good":
            raise ImportError("file too short")
        return super().__call__(*given, **named)


def code() -> Path:
    (folder,) = cache_directory().glob("inductor/*")
    return folder / "ab" / "code.so"


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Generating:
    stand_in = Generating()
    monkeypatch.setattr(inductor_interface, "compile_fx", stand_in)
    return stand_in


@torch.no_grad()
def in_new_process(model: torch.nn.Module, x: torch.Tensor = X, **options: Any) -> tuple[str, str]:
    """The phase, and why, of a process that begins now."""
    forget_everything()
    step, expected = compiled(model, options), model(x)
    pictures = [step(x) for _ in range(4)]
    report = oq.reports()[-1]
    assert all(relative_error(picture, expected) < CLOSE for picture in pictures)
    assert torch.equal(pictures[-1], expected) == (report.phase == "float")
    return report.phase, report.phase_reason


def test_damaged_code_is_replaced_and_not_tried_again(inductor: Generating, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    assert in_new_process(model)[0] == "quantized"
    code().write_text("")
    inductor.attempts = 0
    assert in_new_process(model)[0] == "quantized"
    assert (inductor.attempts, code().read_text()) == (2, "good")
    assert "what" in caplog.text and "holds may be damaged: file too short" in caplog.text
    assert in_new_process(model)[0] == "quantized"
    assert inductor.attempts == 3
    assert [*cache_directory().glob("temporary/*")] == []


def test_code_that_another_size_has_left_damaged_is_replaced(inductor: Generating) -> None:
    model = small()
    in_new_process(model)
    code().write_text("")
    assert in_new_process(model, WIDE)[0] == "quantized"
    assert code().read_text() == "good"


def test_what_cannot_be_compiled_loses_no_code_and_is_tried_twice_only_once(inductor: Generating) -> None:
    model = small()
    in_new_process(model)
    inductor.error, inductor.attempts = RuntimeError("no code for this"), 0
    wide = {"shapes": "static"}
    phase, reason = in_new_process(model, WIDE, **wide)
    assert (phase, "no code for this" in reason, code().read_text(), inductor.attempts) == ("float", True, "good", 2)
    assert in_new_process(model, WIDE, **wide)[0] == "float"
    assert inductor.attempts == 3


def test_damage_is_no_reason_to_give_up_regions(inductor: Generating) -> None:
    model = net(blocks=4)
    in_new_process(model, regional_compilation=True)
    regions = [dict(graph.named_children()).keys() for graph in inductor.graphs]
    assert regions[-1]
    code().write_text("")
    assert in_new_process(model, regional_compilation=True)[0] == "quantized"
    assert dict(inductor.graphs[-1].named_children()).keys() == regions[-1]
    assert [*cache_directory().glob("inductor/*/refused-*")] == []


def test_a_directory_that_cannot_be_emptied_leaves_the_error_as_it_was(
    inductor: Generating, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    in_new_process(model)
    code().write_text("")

    def refuse(path: Path, trash: Path) -> Path:
        raise PermissionError(f"{path} stays")

    monkeypatch.setattr(atomic_files, "_move_away", refuse)
    phase, reason = in_new_process(model)
    assert phase == "float" and "file too short" in reason


def test_an_error_brings_back_what_was_replaced(tmp_path: Path) -> None:
    folder, aside = tmp_path / "folder", tmp_path / "aside"
    for made in (folder, aside):
        made.mkdir()
    (folder / "file").write_text("old")
    with contextlib.suppress(KeyboardInterrupt), atomic_files.replaced(folder, aside):
        assert [*folder.iterdir()] == []
        (folder / "new").write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["file"]
    with atomic_files.replaced(folder, aside):
        (folder / "new").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [*aside.iterdir()] == []


@pytest.mark.slow
@torch.no_grad()
def test_what_inductor_has_generated_is_generated_anew(tmp_path: Path) -> None:
    expected = small()(X)

    def start() -> tuple[str, bool, bool]:
        with ModelProcess(tmp_path / "cache", model="small", inductor=True) as process:
            for answer in [process.ask("call", *X.shape) for _ in range(4)]:
                assert relative_error(torch.tensor(answer["picture"]), expected) < CLOSE
            return answer["phase"], answer["cache_hit"], any("may be damaged" in text for text in process.warnings)

    assert start() == ("quantized", False, False)
    for path in [path for kind in ("py", "main.so") for path in tmp_path.glob(f"cache/inductor/*/*/*.{kind}")]:
        path.unlink()  # a process that has it open goes on with what it has
        path.write_bytes(b"")
    assert start() == ("quantized", True, True)
    assert start() == ("quantized", True, False)
