"""What a model leaves in the cache, and what the next one makes of it, be it whole, corrupt or forged.

The next process is this one after it has forgotten everything; ``test_processes.py`` has real ones. Inductor is
replaced by running the rewritten graph as it is.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.analysis import graph_key
from onlinequant_backend.cache import calibration_file
from onlinequant_backend.cache.cache_store import Cache
from onlinequant_backend.cache.calibration_file import CALIBRATION_FILE, STATS_FILE, Calibration, LayerCalibration
from onlinequant_backend.errors import InsecureCacheDirectoryError
from onlinequant_backend.kernels import clip_counting
from onlinequant_backend.runtime.drift_watch import DriftWatch
from onlinequant_backend.runtime.weight_state import WeightState
from tests.helpers.eager_inductor import EagerInductor
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
    fused,
    is_locked,
    outcome,
    run,
    small,
)
from tests.helpers.tiny import OPTIONS, noise, relative_error


@pytest.fixture(autouse=True)
def inductor(inductor: EagerInductor) -> Iterator[EagerInductor]:
    forget_everything()
    with torch.no_grad():
        yield inductor


def test_the_next_process_finds_everything() -> None:
    step = compiled(small())
    pictures = [step(X) for _ in range(3)]
    made = oq.reports()[-1]
    (entry,) = entries()
    assert entry.name == made.key and made.stats_path == str(entry / STATS_FILE)
    assert outcome(made) == MADE
    forget_everything()
    assert torch.equal(compiled(small())(X), pictures[2])  # the same to the bit, from the first call on
    found = oq.reports()[-1]
    assert outcome(found) == FOUND
    assert found.key == made.key
    assert found.decisions == made.decisions
    assert not is_locked()


def test_the_next_process_knows_the_error_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(small())
    assert made.stats_path is not None and made.error is not None
    assert oq.Report.load(made.stats_path).error == made.error
    forget_everything()
    monkeypatch.setattr(DriftWatch, "_compare", lambda *_: None)  # it would measure that again
    found = run(small())
    assert found.stats_path is not None
    assert found.error == oq.Report.load(found.stats_path).error == made.error


def pushed_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on errors of other layers push values of the first layer's input beyond its range, which is right."""
    pushed = clip_counting.Seen(0.002, 1, 254)

    def drifted(weights: WeightState, *_: object) -> dict[int, clip_counting.Seen]:
        return {0: pushed} if weights.layers[0].clipped < pushed.clipped_in_doubt else {}

    monkeypatch.setattr(WeightState, "drifted", drifted)


def test_the_next_process_does_not_repeat_in_float_what_this_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed_beyond(monkeypatch)
    step = compiled(small())
    pictures = [step(X) for _ in range(4)]
    assert torch.equal(pictures[2], small()(X))  # the first call in 8 bit, repeated
    assert oq.reports()[-1].widened == {}
    forget_everything()
    assert torch.equal(compiled(small())(X), pictures[3])
    assert outcome(oq.reports()[-1]) == FOUND


def test_what_a_lora_pushes_beyond_a_range_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    step = compiled(model)
    for _ in range(3):
        step(X)
    (entry,) = entries()
    before = (entry / CALIBRATION_FILE).read_bytes()
    pushed_beyond(monkeypatch)
    change(model, {"conv_out.weight": fused(model)["conv_out.weight"]}, replace=False)  # no layer reads its result
    assert torch.equal(step(X), model(X))
    assert (entry / CALIBRATION_FILE).read_bytes() == before


def test_each_precision_has_a_calibration_of_its_own() -> None:
    for expected in (MADE, FOUND):
        for precision in ("int8", "fp8"):
            report = run(small(), options={"precision": precision})
            assert (outcome(report), report.precision) == (expected, precision)
            forget_everything()
    assert len(entries()) == 2


def test_another_resolution_is_found_too() -> None:
    assert outcome(run(small())) == MADE
    for x in (WIDE, noise(1, 4, 16, 16)):
        forget_everything()
        assert outcome(run(small(), x)) == FOUND
    assert len(entries()) == 3


def test_another_checkpoint_and_other_calibrations_are_not() -> None:
    run(small())
    for seed, options in ((1, {}), (0, {"calibration_method": "minmax"}), (0, {"sensitivity": "end_to_end"})):
        forget_everything()
        assert outcome(run(small(seed), options=options)) == MADE
    assert len(entries()) == 4


def test_fewer_layers_in_8_bit_need_no_other_calibration() -> None:
    run(small())
    forget_everything()
    report = run(small(), options={"quantized_conv_percentage": 50})
    assert outcome(report) == FOUND
    assert report.counts()["quantized_conv"] == 1


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("name", [CALIBRATION_FILE, STATS_FILE])
@pytest.mark.parametrize("damage", [cut, remove])
def test_a_corrupt_entry_is_made_again(
    name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    key = run(small()).key
    (entry,) = entries()
    whole = Calibration.from_bytes((entry / CALIBRATION_FILE).read_bytes(), key)
    damage(entry / name)
    forget_everything()
    assert outcome(run(small())) == MADE
    (record,) = caplog.records
    assert "was moved aside" in record.getMessage()
    assert len(list(cache_directory().glob("aside/*"))) == 1
    assert entries() == [entry]
    assert Calibration.from_bytes((entry / CALIBRATION_FILE).read_bytes(), key).layers == whole.layers
    forget_everything()
    assert outcome(run(small())) == FOUND
    assert len(caplog.records) == 1


def rename_a_layer(whole: Calibration) -> Calibration:
    return dataclasses.replace(whole, layers=(dataclasses.replace(whole.layers[0], name="other"), *whole.layers[1:]))


def turn_a_weight(whole: Calibration) -> Calibration:
    first = whole.layers[0]
    turned = dataclasses.replace(first, weight_shape=first.weight_shape[::-1])
    return dataclasses.replace(whole, layers=(turned, *whole.layers[1:]))


def drop_a_layer(whole: Calibration) -> Calibration:
    return dataclasses.replace(whole, layers=whole.layers[:-1])


def swap_layers(whole: Calibration) -> Calibration:
    return dataclasses.replace(whole, layers=whole.layers[::-1])


@pytest.mark.parametrize(
    ("forge", "x"),
    [(rename_a_layer, X), (turn_a_weight, X), (drop_a_layer, X), (swap_layers, X), (rename_a_layer, WIDE)],
)
def test_an_entry_for_other_layers_is_not_believed(
    forge: Callable[[Calibration], Calibration], x: torch.Tensor
) -> None:
    key = run(small()).key
    file = cache_directory() / "entries" / key / CALIBRATION_FILE
    file.write_bytes(forge(Calibration.from_bytes(file.read_bytes(), key)).to_bytes(key))
    forget_everything()
    assert outcome(run(small(), x)) == MADE
    forget_everything()
    assert outcome(run(small(), x)) == FOUND
    assert not is_locked()


def forge(whole: Calibration, **changes: Callable[[LayerCalibration], object]) -> Calibration:
    """The same but for some fields of each layer."""
    layers = [
        dataclasses.replace(layer, **{name: make(layer) for name, make in changes.items()}) for layer in whole.layers
    ]
    return dataclasses.replace(whole, layers=tuple(layers))


def scaled(factor: float, zero_point: float = 1) -> Callable[[LayerCalibration], object]:
    """Of a layer: its scale and zero point times these."""

    def qparams(layer: LayerCalibration) -> tuple[float, ...]:
        assert layer.qparams is not None
        inverse, zero, scale = layer.qparams
        return inverse / factor, min(round(zero * zero_point), 254), scale * factor

    return qparams


@pytest.mark.parametrize("method", ["mse", "percentile"])
@pytest.mark.parametrize(
    "changes",
    [
        {"qparams": scaled(1e20)},
        {"qparams": scaled(3)},
        {"qparams": scaled(1e-20)},
        {"qparams": scaled(1, zero_point=300)},
        {"smoothing": lambda layer: (1e-38,) * layer.weight_shape[1]},
        {"smoothing": lambda layer: (2.0**-20,) * layer.weight_shape[1]},
    ],
    ids=["a large scale", "a larger scale", "a small scale", "zero point", "tiny smoothing", "small smoothing"],
)
def test_a_forged_calibration_is_made_again(
    changes: Mapping[str, Callable[[LayerCalibration], object]], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = run(small(), options={"calibration_method": method}).key
    cache = Cache.open(None)
    whole = cache.load(key)
    assert whole is not None
    with monkeypatch.context() as patch:
        patch.setattr(calibration_file, "check", lambda calibration: None)
        cache.publish(key, forge(whole, **changes), "{}")
    forget_everything()
    assert outcome(run(small(), options={"calibration_method": method})) == MADE
    forget_everything()
    assert outcome(run(small(), options={"calibration_method": method})) == FOUND


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_a_narrower_range_than_a_method_gives_is_made_again(method: str) -> None:
    key = run(small(), options={"calibration_method": method}).key
    cache = Cache.open(None)
    whole = cache.load(key)
    assert whole is not None
    cache.publish(key, forge(whole, qparams=scaled(0.06), clipped=lambda layer: 1.0), "{}")
    forget_everything()
    assert outcome(run(small(), options={"calibration_method": method})) == MADE


def test_ranges_that_were_widened_are_found() -> None:
    model = small()
    step = compiled(model, {"drift_check_every": 1})
    for factor in (1, 1, 1, 4, 4):
        step(factor * X)
    assert oq.reports()[-1].widened
    step(WIDE)  # after whose compile all is saved
    forget_everything()
    assert outcome(run(small(), WIDE)) == FOUND


def change(model: nn.Module, weights: Mapping[str, torch.Tensor], replace: bool) -> None:
    """Give a model other weights: new parameters, or other values of the old ones."""
    for name, value in weights.items():
        module, _, parameter = name.rpartition(".")
        if replace:
            setattr(model.get_submodule(module), parameter, value)
        else:
            model.get_parameter(name).copy_(value)


@pytest.mark.parametrize("replace", [False, True], ids=["in place", "new parameters"])
def test_weights_changed_after_calibrating_are_not_published(replace: bool) -> None:
    model = small()
    key = run(model).key
    change(model, {name: nn.Parameter(value, False) for name, value in fused(model).items()}, replace)
    report = run(model, WIDE)
    assert (report.calls_observed, report.stats_path) == (0, None)
    assert [entry.name for entry in entries()] == [key]
    assert not is_locked()
    changed = model.state_dict()
    forget_everything()
    same = small()
    same.load_state_dict(changed)
    assert outcome(run(same, WIDE)) == MADE


@pytest.mark.parametrize("replace", [False, True], ids=["in place", "new parameters"])
@pytest.mark.parametrize("back", [False, True], ids=["for good", "and back"])
def test_weights_changed_while_calibrating_are_not_published(replace: bool, back: bool) -> None:
    """What is observed then belongs to no weights."""
    model = small()
    step = compiled(model, {"calibration_steps": 3})
    step(X)
    lora = {name: nn.Parameter(value, False) for name, value in fused(model).items()}
    originals = {name: model.get_parameter(name) for name in lora}
    plain = originals if replace else {name: value.clone() for name, value in originals.items()}
    change(model, lora, replace)
    step(X)
    if back:
        change(model, plain, replace)
    assert torch.equal(step(X), model(X))
    assert 0 < relative_error(step(X), model(X)) < CLOSE
    assert oq.reports()[-1].phase == "quantized"
    assert entries() == []
    assert not is_locked()


def test_weights_that_change_without_a_trace_in_an_observed_run_are_not_published() -> None:
    model = small()
    step = compiled(model)
    with oq.sampling_run(3):
        for _ in range(3):
            step(X)
            for value in dict(fused(model)):
                model.get_parameter(value).data.mul_(1.01)
    assert 0 < relative_error(step(X), model(X)) < CLOSE
    assert entries() == []


def test_weights_are_looked_at_once_in_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    fingerprint = graph_key.fingerprint
    monkeypatch.setattr(graph_key, "fingerprint", lambda parameters: looks.append(1) or fingerprint(parameters))
    step = compiled(small(), {"calibration_steps": 12})
    for _ in range(2):
        step(X)
    begun = len(looks)
    for _ in range(8):
        step(X)
    assert len(looks) == begun > 0
    for _ in range(3):
        step(X)
    assert len(looks) > begun  # at the end they are compared with those at the beginning


@pytest.mark.parametrize("replace", [False, True], ids=["in place", "new parameters"])
def test_another_checkpoint_that_is_loaded_has_an_entry_of_its_own(replace: bool) -> None:
    model = small()
    run(model)
    model.load_state_dict(small(seed=1).state_dict(), assign=replace)
    report = run(model.requires_grad_(False))
    assert (report.calls_observed, len(entries())) == (2, 2)
    for seed in (0, 1):
        forget_everything()
        assert outcome(run(small(seed))) == FOUND
    assert not is_locked()


def test_every_block_has_an_entry_where_one_graph_serves_many() -> None:
    """Regional compilation: each block brings weights of its own."""
    for observed in (True, False):
        blocks = [small(seed) for seed in range(3)]
        for block in blocks:
            block.compile(backend=oq.onlinequant, options=dict(OPTIONS))
        for block in blocks:
            assert torch.equal(block(X), block.forward(X)) == observed
        for block in blocks * 2:
            assert relative_error(block(X), block.forward(X)) < CLOSE
        assert len(oq.reports()) == 1
        assert len(entries()) == 3
        assert not is_locked()
        forget_everything()


def test_a_model_is_locked_from_its_first_call_until_it_is_compiled() -> None:
    step = compiled(small())
    for _ in range(2):
        step(X)
        assert is_locked()
    step(X)
    assert not is_locked()
    step(WIDE)
    assert not is_locked()
    assert len(entries()) == 2


def test_a_model_that_changes_its_size_while_calibrating_is_not_locked_for_good() -> None:
    step = compiled(small())
    step(X)
    for _ in range(3):
        step(WIDE)
    assert oq.reports()[-1].phase == "quantized"
    assert not is_locked()


def test_a_model_dropped_while_calibrating_is_not_locked() -> None:
    model = small()
    step = compiled(model)
    step(X)
    assert is_locked()
    del model, step
    gc.collect()
    assert not is_locked()


@pytest.mark.parametrize("when", ["observing", "compiling"])
def test_a_model_that_fails_is_not_locked(when: str, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    model = small()
    step = compiled(model)
    step(X)
    if when == "observing":
        monkeypatch.setattr("onlinequant_backend.quantization.observation.Observation.see", fail)
    else:
        inductor.error = MemoryError("no memory")
    for _ in range(3):
        assert torch.equal(step(X), model(X))
    assert oq.reports()[-1].phase == "float"
    assert not is_locked()


def test_a_lock_that_cannot_be_had_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(Cache, "lock", lambda _, key, timeout: waited.append(timeout))
    assert outcome(run(small(), options={"lock_timeout": 5})) == MADE
    assert sum(waited) == 5


def test_a_model_that_gives_up_its_float_weights_is_published() -> None:
    options = {"free_float_weights": True}
    step, expected = compiled(small(), options), small()(X)
    for _ in range(3):
        picture = step(X)
    assert 0 < relative_error(picture, expected) < CLOSE
    assert outcome(oq.reports()[-1]) == MADE
    (entry,) = entries()
    forget_everything()
    step = compiled(small(), options)
    assert torch.equal(step(X), picture)
    assert (oq.reports()[-1].key, *outcome(oq.reports()[-1])) == (entry.name, *FOUND)
    assert 0 < relative_error(step(WIDE), small()(WIDE)) < CLOSE
    # The weights' part of the second shape's key, too, is that of the float weights.
    assert len(entries()) == 2 and len({path.name[16:32] for path in entries()}) == 1
    assert not is_locked()


@pytest.mark.parametrize("part", [".", "entries", "inductor"])
def test_a_directory_that_others_can_write_to_is_refused(part: str) -> None:
    run(small())
    (cache_directory() / part).chmod(0o777)
    forget_everything()
    model: Any = small()
    with pytest.raises(InsecureCacheDirectoryError, match="chmod 700") as raised:
        compiled(model)(X)
    assert type(raised.value) is InsecureCacheDirectoryError
    assert str(cache_directory()) in str(raised.value)
    (cache_directory() / part).chmod(0o700)
    forget_everything()
    assert outcome(run(model)) == FOUND
