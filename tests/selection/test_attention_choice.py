from __future__ import annotations

from typing import Any

import pytest
import torch

from onlinequant_backend import ops
from onlinequant_backend.graph import AttentionInfo
from onlinequant_backend.graph.attention_info import attention_nodes
from onlinequant_backend.graph.layer_info import Sensitivity
from onlinequant_backend.kernels.cpu_providers import Emulated
from onlinequant_backend.kernels.formats import FP8, Format
from onlinequant_backend.kernels.nvidia import gpu, tuning
from onlinequant_backend.kernels.nvidia.tuning import GATHER, TMA, Tile
from onlinequant_backend.selection import layer_timing, layer_trial
from onlinequant_backend.selection.attention_choice import choose_attention
from onlinequant_backend.selection.layer_timing import Timing
from onlinequant_backend.selection.layer_trial import AttentionTrial
from tests.helpers.attending import Attending, Twice, attention, probe_of
from tests.helpers.graph_probe import GraphProbe
from tests.helpers.tiny import noise

CPU = torch.device("cpu")
TILE = Tile(TMA, 128, 128, 0, 8, 3)


@pytest.fixture
def is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Emulated, "times_layers", True)


def chosen(probe: GraphProbe, slow: dict[str, str] | None = None) -> list[tuple[bool, bool, str]]:
    """Of all attention: whether it is replaced, and in 8 bit, and why."""
    choose_attention(probe.graph_module, probe.context, slow or {})
    return [(info.is_replaced, info.quantized, info.reason) for info in attention(probe)]


def timed(probe: GraphProbe) -> list[AttentionInfo]:
    found = attention(probe)
    for info in found:
        info.float_us, info.quantized_us = 20.0, 10.0
    return found


def test_what_is_faster_is_in_8_bit(is_timed: None) -> None:
    probe = probe_of(Twice())
    timed(probe)
    assert chosen(probe, {"attn.2": "gains too little"}) == [
        (True, True, "selected"),
        (False, False, "gains too little"),
    ]
    # Another checkpoint, with which the second one is faster.
    assert chosen(probe) == [(True, True, "selected")] * 2


def test_what_was_not_timed_stays_in_float(is_timed: None) -> None:
    assert chosen(probe_of(Twice())) == [(False, False, "there was no memory to time it")] * 2


def test_alone_it_stays_in_float(is_timed: None) -> None:
    probe = probe_of(Twice())
    timed(probe)
    for info in probe.infos:
        info.quantized = False
    assert chosen(probe) == [(False, False, "no other layer is in 8 bit")] * 2


def test_short_sequences_are_in_float_by_another_kernel(is_timed: None) -> None:
    probe = probe_of(Attending(), noise(3, 25, 64), noise(3, 25, 64), quantized_attention_percentage=0)
    timed(probe)
    reason = "in float, by a kernel for short sequences: 10.0 us, 20.0 us by torch"
    assert chosen(probe) == [(True, False, reason)]


@pytest.mark.parametrize(("least", "selected"), [(20.0, True), (1000.0, False)])
def test_without_times_the_density_decides(least: float, selected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Emulated, "least_density", lambda _self, _kind: least)
    found = chosen(probe_of(Attending()))
    assert [(replaced, quantized) for replaced, quantized, _ in found] == [(selected, selected)]
    assert found[0][2] == "selected" if selected else found[0][2].endswith("is below 1000")


@pytest.mark.parametrize("errors", [(0.02, 0.01), (0.02, None), (0.02, float("nan"))])
def test_a_percentage_keeps_the_least_sensitive(errors: tuple[float, float | None], is_timed: None) -> None:
    probe = probe_of(Twice(), quantized_attention_percentage=50)
    for info, error in zip(timed(probe), errors, strict=True):
        info.sensitivity = None if error is None else Sensitivity(error, 0, 0)
    kept = int(errors[1] == 0.01)
    found = chosen(probe)
    assert found[kept] == (True, True, "selected")
    assert found[1 - kept][:2] == (False, False)
    assert found[1 - kept][2].endswith("ranks 2 of 2; quantized_attention_percentage=50 keeps 1")


def test_attention_is_timed_like_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_timing, "_known", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(layer_timing, "gpu_of", lambda _device: gpu.NONE)
    monkeypatch.setattr(layer_timing, "compile_ahead", lambda *_: None)
    names = list[str]()

    def time_layer(info: Any, _format: Format, _device: torch.device) -> Timing:
        names.append(info.name)
        times = {"attn": (10.0, 9.3), "attn.2": (10.0, 9.1)}.get(info.name, (10.0, 5.0))
        return Timing(*times, 0.0, TILE)

    monkeypatch.setattr(layer_timing, "time_layer", time_layer)
    probe = probe_of(Twice())
    reasons = layer_timing.measure(probe.graph_module, FP8, CPU)
    assert reasons == {"attn": "gains too little: 9.3 us quantized, 10.0 us in float"}
    assert [(info.float_us, info.quantized_us) for info in attention(probe)] == [(10.0, 9.3), (10.0, 9.1)]
    assert tuning.attention_tile(8, 128, 70, 16, FP8.activation, gpu.NONE) == TILE
    saved = layer_timing.dump(probe.graph_module, FP8, CPU)
    assert saved is not None and "attention torch.float8_e4m3fn 8 128x70 16" in saved
    monkeypatch.setattr(layer_timing, "_known", {})
    number = len(names)
    assert layer_timing.restore(saved, CPU) == number
    assert layer_timing.measure(probe_of(Twice()).graph_module, FP8, CPU) == reasons and len(names) == number


def test_attention_that_options_refuse_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_of(Attending(), quantized_attention_percentage=0)
    assert not layer_timing._attention(probe.graph_module)
    assert len(list(attention_nodes(probe.graph_module))) == 1


def trial_on_a_cpu(monkeypatch: pytest.MonkeyPatch, info: AttentionInfo, factor: float = 1.0) -> AttentionTrial:
    """A trial whose kernel is the emulated one; its results are ``factor`` times as large as they should be."""

    def run(q: Any, k: Any, v: Any, scale: float, format: str, _tile: Tile) -> torch.Tensor:
        return factor * ops.attention(q, k, v, scale, format)

    monkeypatch.setattr(layer_trial.operators, "run_attention", run)
    return AttentionTrial(info, FP8, CPU)


def test_a_kernel_whose_result_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (info,) = attention(probe_of(Attending()))
    trial = trial_on_a_cpu(monkeypatch, info)
    trial.check(trial.run(TILE))
    assert trial.share == 1 and trial.in_float().shape == info.output_shape and not caplog.text
    for factor in (0.5, float("nan")):
        trial = trial_on_a_cpu(monkeypatch, info, factor)
        with pytest.raises(RuntimeError, match="its relative error is"):
            trial.check(trial.run(TILE))
    assert "a kernel for attention in fp8 is not used" in caplog.text


def test_a_large_batch_is_timed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_trial, "_MOST_VALUES", 3 * 4 * 128 * 16)
    info = AttentionInfo("attn", (8, 4, 100, 16), (8, 4, 128, 16), (8, 4, 100, 16), dtype=torch.bfloat16)
    trial = trial_on_a_cpu(monkeypatch, info)
    assert trial.share == 3 / 8
    result = trial.run(TILE)
    assert result.shape == (3, 4, 100, 16) and result.dtype == torch.bfloat16
    trial.check(result)


def test_int8_heads_above_128_do_without_the_accelerator() -> None:
    hopper = gpu.NONE._replace(has_tma=True)
    for size, dtype, kernel in (
        (160, torch.int8, GATHER),
        (128, torch.int8, TMA),
        (160, torch.float8_e4m3fn, TMA),
    ):
        assert {tile.kernel for tile in tuning.attention_tiles(16, 256, 256, size, dtype, hopper)} == {kernel}
