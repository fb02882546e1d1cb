from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend.graph import LayerInfo
from onlinequant_backend.kernels.formats import FP8, Format
from onlinequant_backend.kernels.nvidia import gpu, tuning
from onlinequant_backend.kernels.nvidia.tuning import CUBLAS, TMA, Tile
from onlinequant_backend.passes.select_nodes import select_nodes
from onlinequant_backend.report import NodeDecision
from onlinequant_backend.selection import layer_timing
from onlinequant_backend.selection.layer_timing import Timing
from tests.helpers.graph_probe import SYMMETRIC, GraphProbe
from tests.helpers.tiny import noise

CPU = torch.device("cpu")
WIDE = Tile(TMA, 128, 128, 128, 8, 4)
A_GPU = gpu.NONE._replace(name="a GPU")


class Attention(nn.Module):
    """Two linears that read one tensor, one that reads what is computed value by value, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 48)
        self.conv = nn.Conv2d(3, 4, 3)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.out((self.q(x) * self.k(x)).flatten(1, 1)).sum() + self.conv(image).sum()


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_timing, "_known", {})
    monkeypatch.setattr(layer_timing, "_compiled", set())
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(layer_timing, "gpu_of", lambda _device: A_GPU)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that were timed; a layer of 64 outputs is the only one that is slower in 8 bit."""
    names: list[str] = []

    def time_layer(info: LayerInfo, _format: Format, _device: torch.device) -> Timing:
        names.append(info.name)
        quantized_us = {"out": 9.8, "q and 1 more": 7.0, "conv": 5.0}.get(info.name, 5.0)
        return Timing(10.0, quantized_us, 4.0, WIDE)

    monkeypatch.setattr(layer_timing, "time_layer", time_layer)
    monkeypatch.setattr(layer_timing, "compile_ahead", lambda *_: None)
    return names


def analyzed() -> GraphProbe:
    return GraphProbe(Attention(), noise(2, 6, 32), noise(1, 3, 8, 8), precision=SYMMETRIC[1]).analyze()


def test_every_shape_is_timed_once_and_what_is_not_faster_stays_in_float(timed: list[str]) -> None:
    probe = analyzed()
    reasons = layer_timing.measure(probe.graph_module, FP8, CPU)
    assert sorted(timed) == ["conv", "out", "q", "q and 1 more"]  # k is like q
    assert reasons == {"out": "gains too little: 9.8 us quantized, 10.0 us in float"}
    times = {info.name: (info.float_us, info.quantized_us) for info in probe.infos}
    # q and k are one product of a tensor that is quantized by itself; what ``out`` reads is when it is computed.
    assert times == {"q": (10, 5.5), "k": (10, 5.5), "out": (10, 9.8), "conv": (10, 9)}
    assert {decision.quantized_us for decision in (NodeDecision.of(info) for info in probe.infos)} == {5.5, 9, 9.8}
    assert layer_timing.measure(analyzed().graph_module, FP8, CPU) == reasons
    assert len(timed) == 4


def test_a_product_that_is_too_large_is_judged_by_its_layers(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_timing, "_LARGEST_MERGED", 2 * 32 * 32 * 4 - 1)  # one byte less than q and k in float32
    probe = analyzed()
    assert set(layer_timing.measure(probe.graph_module, FP8, CPU)) == {"out"}
    assert sorted(timed) == ["conv", "out", "q"]
    # Each 5, and their input is quantized once.
    assert {info.name: info.quantized_us for info in probe.infos if info.name in "qk"} == {"q": 7, "k": 7}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_a_layer_without_memory_to_time_it_is_in_8_bit(
    timed: list[str], error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_for(monkeypatch, "out", error)
    probe = analyzed()
    assert "out" not in layer_timing.measure(probe.graph_module, FP8, CPU)
    assert "out is not timed" in caplog.text
    times = {info.name: info.quantized_us for info in probe.infos}
    assert (times["q"], times["out"]) == (5.5, None)


def test_other_errors_of_timing_are_told(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_for(monkeypatch, "q", RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        layer_timing.measure(analyzed().graph_module, FP8, CPU)


def fail_for(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    time_layer = layer_timing.time_layer

    def failing(info: LayerInfo, format: Format, device: torch.device) -> Timing:
        if info.name == name:
            raise error
        return time_layer(info, format, device)

    monkeypatch.setattr(layer_timing, "time_layer", failing)


class Trial:
    """Notes which tile is compiled; the convolution's cannot be."""

    ran: list[tuple[str, Tile]]
    devices: set[str]

    def __init__(self, info: LayerInfo, _format: Format, device: torch.device) -> None:
        self._name = info.name
        self.devices.add(device.type)

    def run(self, tile: Tile) -> None:
        self.ran.append((self._name, tile))
        if self._name == "conv":
            raise RuntimeError("no such instruction")


def test_kernels_are_compiled_ahead_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Trial.ran, Trial.devices = [], set()
    monkeypatch.setattr(layer_timing, "trial_of", Trial)
    monkeypatch.setattr(layer_timing.precompile, "on", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(layer_timing, "candidates", lambda *_: (WIDE,))
    graph_module = analyzed().graph_module
    for _ in range(2):
        layer_timing.compile_ahead(graph_module, FP8, CPU)
        assert sorted(Trial.ran) == [(name, WIDE) for name in ("conv", "out", "q", "q and 1 more")]
    assert Trial.devices == {"meta"}


def test_linears_are_worth_it_together_or_not_at_all(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Timing(10.0, 16.5, 4.0, WIDE)
    monkeypatch.setattr(layer_timing, "time_layer", lambda info, _format, _device: slow)
    assert set(layer_timing.measure(analyzed().graph_module, FP8, CPU)) == {"q", "k", "out", "conv"}


def test_a_layer_may_be_slower_where_memory_matters(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(share: float) -> dict[str, str]:
        slow = Timing(10.0, 10 * (1 + share) - 4, 4.0, WIDE)  # and 4 to quantize what it reads
        monkeypatch.setattr(layer_timing, "_known", {})
        monkeypatch.setattr(layer_timing, "time_layer", lambda info, _format, _device: slow)
        return layer_timing.measure(analyzed().graph_module, FP8, CPU, saves_memory=True)

    assert "conv" not in measured(0.24)
    assert "conv" in measured(0.26)


@pytest.mark.parametrize(
    ("made", "us", "least_gain"),
    [
        (lambda x: F.layer_norm(x, (32,)), 5, 0),
        (lambda x: F.silu(F.group_norm(x, 3)).transpose(0, 1), 5, 0),
        (lambda x: F.silu(x).view(2, 6, 32), 5, 0.08),
        (lambda x: F.dropout((x * 2).transpose(0, 1), 0.0), 5, 0.08),
        (lambda x: x, 9, 0.08),
        (lambda x: (x @ x.transpose(1, 2) @ x).reshape(2, 6, 32), 9, 0.08),
    ],
)
def test_what_makes_the_values_decides_what_quantizing_them_costs(
    made: Callable[[torch.Tensor], torch.Tensor], us: float, least_gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(made(x))

    probe = GraphProbe(Layer(), noise(2, 6, 32), precision=SYMMETRIC[1]).analyze()
    for float_us, is_fast in ((us / (1 - least_gain) + 0.01, True), (us / (1 - least_gain) - 0.01, False)):
        monkeypatch.setattr(layer_timing, "_known", {})
        timing = Timing(float_us, 5.0, 4.0, WIDE)
        monkeypatch.setattr(layer_timing, "time_layer", lambda *_, timing=timing: timing)
        assert (layer_timing.measure(probe.graph_module, FP8, CPU) == {}) == is_fast
        assert [info.quantized_us for info in probe.infos] == [us]


def test_the_best_tile_is_used_from_then_on(timed: list[str]) -> None:
    assert tuning.linear_tile(12, 32, 32, torch.float8_e4m3fn, A_GPU) != WIDE
    layer_timing.measure(analyzed().graph_module, FP8, CPU)
    assert tuning.linear_tile(12, 32, 32, torch.float8_e4m3fn, A_GPU) == WIDE
    assert tuning.linear_tile(12, 64, 32, torch.float8_e4m3fn, A_GPU) == WIDE  # q and k as one


def test_another_process_takes_the_timings_over(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    probe = analyzed()
    reasons = layer_timing.measure(probe.graph_module, FP8, CPU)
    text = layer_timing.dump(probe.graph_module, FP8)
    monkeypatch.setattr(layer_timing, "_known", {})
    assert layer_timing.dump(probe.graph_module, FP8) is None
    assert layer_timing.restore(text) == 4
    assert layer_timing.measure(probe.graph_module, FP8, CPU) == reasons
    assert len(timed) == 4
    monkeypatch.setattr(layer_timing, "gpu_of", lambda _device: A_GPU._replace(name="another GPU"))
    monkeypatch.setattr(layer_timing, "_known", {})
    assert layer_timing.restore(text) == 0


GOOD: dict[str, Any] = {
    "version": 1,
    "device": "a GPU",
    "timings": {
        "linear torch.float8_e4m3fn 12x32 32 torch.float32": {
            "float_us": 3.0,
            "quantized_us": 2.0,
            "quantize_us": 1.0,
            "tile": {"kernel": CUBLAS, "rows": 0, "columns": 0, "depth": 0, "warps": 0, "stages": 0, "splits": 1},
        }
    },
}


def damaged(path: tuple[str, ...], value: Any) -> str:
    data = copy.deepcopy(GOOD)
    place = data
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return json.dumps(data)


TIMING = ("timings", next(iter(GOOD["timings"])))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        "{",
        "[" * 100_000,
        damaged(("version",), 2),
        damaged(("device",), "another GPU"),
        damaged(("timings",), [1]),
        damaged((*TIMING, "float_us"), 0.0),
        damaged((*TIMING, "float_us"), -1.0),
        damaged((*TIMING, "quantized_us"), float("nan")),
        damaged((*TIMING, "quantized_us"), float("inf")),
        damaged((*TIMING, "quantize_us"), "1"),
        damaged((*TIMING, "tile"), {"kernel": "rm -rf"}),
        damaged((*TIMING, "tile", "rows"), 2**40),
        damaged((*TIMING, "tile", "splits"), 10**9),
        damaged((*TIMING, "tile", "more"), 1),
        damaged(TIMING, None),
    ],
)
def test_what_cannot_be_is_ignored(text: str | None) -> None:
    assert layer_timing.restore(json.dumps(GOOD)) == 1
    layer_timing._known.clear()
    assert layer_timing.restore(text) == 0
    assert layer_timing._known == {}


@pytest.mark.parametrize(
    ("device", "chosen", "threshold", "expected"),
    [
        ("cuda", "auto", None, 4),  # by timing alone
        ("cuda", "auto", 1e6, 0),
        ("cuda", "measured", 1e6, 0),
        ("cuda", "density", 1e6, 0),
        ("cuda", "density", None, 0),
        ("cpu", "auto", None, 0),
        ("cpu", "auto", 0, 4),
    ],
)
def test_a_threshold_that_is_set_holds_and_others_only_where_nothing_is_timed(
    device: str, chosen: str, threshold: float | None, expected: int
) -> None:
    probe = analyzed()
    names = ("conv_compute_density_threshold", "linear_compute_density_threshold")
    config = probe.context.config
    probe.context.config = dataclasses.replace(config, **dict.fromkeys(names, threshold), selection=chosen)  # type: ignore[arg-type]
    probe.context.device = torch.device(device)
    probe.run(select_nodes)
    assert len(probe.quantized()) == expected
    for info in probe.infos:
        if threshold and not info.quantized:
            assert info.reason.endswith(f"is below {info.kind}_compute_density_threshold=1e+06")
