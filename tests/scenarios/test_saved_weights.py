"""With ``save_weights`` a later process reads 8-bit weights instead of quantizing, and computes the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import onlinequant_backend as oq
from onlinequant_backend import best_effort
from onlinequant_backend.analysis import graph_key
from onlinequant_backend.cache.weights_file import WEIGHTS_FILE
from onlinequant_backend.quantization import weight_copy
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.model_process import ModelProcess
from tests.helpers.small import CLOSE, FOUND, X, cache_directory, compiled, forget_everything, outcome, run, small
from tests.helpers.tiny import relative_error

PRECISIONS = ("int8", "fp8")
SAVING = {"save_weights": True}
Start = Callable[..., ModelProcess]


@pytest.fixture(autouse=True)
def inductor(inductor: EagerInductor) -> Iterator[EagerInductor]:
    forget_everything()
    with torch.no_grad():
        yield inductor


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights that are quantized from now on."""
    shapes, quantize = list[torch.Size](), weight_copy.quantize_weight

    def noted(weight: torch.Tensor, *given: object) -> object:
        shapes.append(weight.shape)
        return quantize(weight, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_copy, "quantize_weight", noted)
    return shapes


def files() -> list[Path]:
    return sorted(cache_directory().glob(f"weights/*/{WEIGHTS_FILE}"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_next_process_reads_all_weights(precision: str, quantized: list[torch.Size]) -> None:
    options = {**SAVING, "precision": precision}
    made = compiled(small(), options)
    pictures = [made(X) for _ in range(4)]
    (file,) = files()
    before, number = file.stat().st_mtime_ns, len(quantized)
    assert number == 3
    forget_everything()
    assert torch.equal(compiled(small(), options)(X), pictures[-1])
    assert outcome(oq.reports()[-1]) == FOUND
    assert len(quantized) == number
    assert file.stat().st_mtime_ns == before  # and does not save them again


def test_nothing_is_saved_or_read_unless_it_is_asked_for(quantized: list[torch.Size]) -> None:
    run(small())
    assert files() == []
    forget_everything()
    run(small(), options=SAVING)
    assert len(files()) == 1
    quantized.clear()
    forget_everything()
    run(small())
    assert len(quantized) == 3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_lora_that_no_sample_shows_is_quantized(
    precision: str, quantized: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry is that of the checkpoint without it, since the fingerprint has samples only."""
    monkeypatch.setattr(graph_key, "_SAMPLES", 1)
    options = {**SAVING, "precision": precision}
    run(small(), options=options)
    key = oq.reports()[-1].key
    forget_everything()
    quantized.clear()
    merged = small()
    merged.linear.weight[1:].mul_(-1)
    picture = compiled(merged, options)(X)
    assert oq.reports()[-1].key == key
    assert quantized == [merged.linear.weight.shape]
    assert 0 < relative_error(picture, merged(X)) < CLOSE


def test_a_lora_in_a_running_process_is_quantized(quantized: list[torch.Size]) -> None:
    run(small(), options=SAVING)
    forget_everything()
    quantized.clear()
    model = small()
    step = compiled(model, SAVING)
    step(X)
    assert not quantized
    model.linear.weight.mul_(-1)
    assert relative_error(step(X), model(X)) < CLOSE
    assert quantized == [model.linear.weight.shape]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing left": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "a bit of the header": lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    "a bit of a scale": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "a bit of a weight": lambda data: data[:-500] + bytes([data[-500] ^ 1]) + data[-499:],
    "another program's": lambda data: bytes(range(256)) * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_quantized_and_saved_again(
    damage: Callable[[bytes], bytes], quantized: list[torch.Size], caplog: pytest.LogCaptureFixture
) -> None:
    step = compiled(small(), SAVING)
    expected = [step(X) for _ in range(4)][-1]
    (file,) = files()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    forget_everything()
    quantized.clear()
    assert torch.equal(compiled(small(), SAVING)(X), expected)
    assert quantized
    assert any("are not used" in record.getMessage() for record in caplog.records)
    assert [path.read_bytes() for path in files()] == [whole]
    best_effort.forget()


def test_a_model_that_gives_up_its_float_weights_has_saved_them(quantized: list[torch.Size]) -> None:
    options = {**SAVING, "free_float_weights": True}
    step = compiled(small(), options)
    expected = [step(X) for _ in range(4)][-1]
    assert len(files()) == 1
    forget_everything()
    quantized.clear()
    step = compiled(small(), options)
    assert torch.equal(step(X), expected) and torch.equal(step(X), expected)
    assert not quantized


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process on a cache; none of them outlives the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **given: stack.enter_context(ModelProcess(tmp_path.resolve() / "cache", **given))


def test_two_processes(start: Start, tmp_path: Path) -> None:
    shape = (1, 4, 8, 8)
    first = start(model="small", **SAVING)
    answers = [first.ask("call", *shape) for _ in range(4)]
    assert answers[-1]["phase"] == "quantized" and first.ask("quantized_weights") == 3
    second = start(model="small", new_interpreter=True, **SAVING)
    answer = second.ask("call", *shape)
    assert answer["picture"] == answers[-1]["picture"] and answer["cache_hit"]
    assert second.ask("quantized_weights") == 0
    (file,) = (tmp_path / "cache" / "weights").glob(f"*/{WEIGHTS_FILE}")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    third = start(model="small", **SAVING)
    assert third.ask("call", *shape)["picture"] == answers[-1]["picture"]
    assert third.ask("quantized_weights") == 1
    assert any("are not used" in text for text in third.warnings)
