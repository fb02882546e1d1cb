from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend.config import QuantConfig
from onlinequant_backend.graph import ConvGeometry
from onlinequant_backend.graph.layer_info import Sensitivity
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.passes.select_nodes import select_nodes
from onlinequant_backend.report.report import CANDIDATE
from tests.helpers.graph_probe import EIGHT_BITS, SYMMETRIC, GraphProbe, WithWeight
from tests.helpers.tiny import net, noise

IMAGE = noise(1, 4, 8, 8)
ROWS = noise(2, 8)


class Mixed(nn.Module):
    """Four linears and two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.linears = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linears(self.convs(x))


CONVS = ["convs.0", "convs.1"]
LINEARS = [f"linears.{i}" for i in range(4)]
# In order: linears 2, 0, 3, 1 and convs 1, 0.
SENSITIVITIES = {
    "convs_0": 0.9,
    "convs_1": 0.8,
    "linears_0": 0.02,
    "linears_1": 0.04,
    "linears_2": 0.01,
    "linears_3": 0.03,
}


def conv2d(*shape: int, **arguments: Any) -> nn.Module:
    return WithWeight(lambda x, w: F.conv2d(x, w, **arguments), *shape)


@pytest.mark.parametrize(
    ("conv", "stride", "padding", "dilation"),
    [
        (nn.Conv2d(4, 4, 1), (1, 1), (0, 0), (1, 1)),
        (nn.Conv2d(4, 4, 3, stride=(2, 1), padding=(1, 2)), (2, 1), (1, 2), (1, 1)),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), (1, 1), (2, 2), (2, 2)),
        (nn.Conv2d(4, 4, 3, padding="same"), (1, 1), (1, 1), (1, 1)),
        (nn.Conv2d(4, 4, (1, 5), padding="same"), (1, 1), (0, 2), (1, 1)),
        (nn.Conv2d(4, 4, 2, padding="same", dilation=2), (1, 1), (1, 1), (2, 2)),
        (nn.Conv2d(4, 4, 3, padding="valid", stride=2), (2, 2), (0, 0), (1, 1)),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (1, 1), (0, 0), (1, 1)),
        (conv2d(4, 4, 3, 3), (1, 1), (0, 0), (1, 1)),
        (conv2d(4, 4, 3, 3, stride=2, padding=1, dilation=1), (2, 2), (1, 1), (1, 1)),
        (conv2d(4, 4, 3, 3, stride=[2], padding=[1]), (2, 2), (1, 1), (1, 1)),
    ],
)
def test_geometry_of_a_convolution(
    conv: nn.Module, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> None:
    info = GraphProbe(conv, IMAGE).analyze().info
    assert (info.quantized, info.geometry) == (True, ConvGeometry(stride, padding, dilation))


def test_convolution_over_time_is_quantized() -> None:
    """The temporal convolution of video models."""
    info = GraphProbe(nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)), noise(1, 4, 5, 2, 2)).analyze().info
    assert (info.quantized, info.geometry) == (True, ConvGeometry((1, 1, 1), (1, 0, 0), (1, 1, 1)))


@pytest.mark.parametrize(
    ("module", "x", "reason"),
    [
        (nn.Conv2d(4, 4, 2, padding="same"), IMAGE, 'padding="same" is lopsided for an even kernel'),
        (nn.Conv2d(4, 4, 3, groups=2), IMAGE, "grouped convolutions (groups=2) have no 8-bit kernel"),
        (nn.Conv2d(4, 4, 3, groups=4), IMAGE, "grouped convolutions (groups=4) have no 8-bit kernel"),
        (nn.ConvTranspose2d(4, 4, 3), IMAGE, "transposed convolutions have no 8-bit kernel"),
        (nn.Conv1d(4, 4, 3), noise(1, 4, 8), "1-d convolutions have no 8-bit kernel"),
        (nn.Conv2d(4, 4, 3), IMAGE[0], "its input has no batch dimension"),
        (nn.Conv2d(4, 4, 3), IMAGE[:0], "it computes nothing"),
        (WithWeight(F.linear, 8), ROWS, "its weight is not a matrix"),
        (nn.Conv2d(4, 4, 3).double(), IMAGE.double(), "its dtype torch.float64 has no 8-bit kernel"),
        (WithWeight(lambda x, w: F.conv2d(x, w * 2), 4, 4, 3, 3), IMAGE, "its weight is computed in the graph"),
        (WithWeight(lambda x, w: F.linear(x, w * 2), 8, 8), ROWS, "its weight is computed in the graph"),
        (WithWeight(lambda x, w: F.linear(w, x), 4, 8), ROWS, "its weight is computed in the graph"),
        (WithWeight(lambda x, w: F.linear(x, w) * w[0].mul_(2), 8, 8), ROWS, "its weight is written in the graph"),
        (nn.Linear(8, 8).double(), ROWS.double(), "its dtype torch.float64 has no 8-bit kernel"),
    ],
)
def test_what_no_kernel_can_do_is_refused(module: nn.Module, x: torch.Tensor, reason: str) -> None:
    info = GraphProbe(module, x).analyze().info
    assert (info.quantized, info.index) == (False, None)
    assert info.reason.startswith(reason)


@pytest.mark.parametrize("stride", [lambda number: (number, 1), lambda number: number])
def test_geometry_that_is_not_a_number_is_refused(stride: Callable[[int], Any]) -> None:
    conv = WithWeight(lambda x, w, number: F.conv2d(x, w, stride=stride(number)), 4, 4, 3, 3)
    info = GraphProbe(conv, IMAGE, 3, dynamic=True).analyze().info
    assert (info.quantized, info.reason) == (False, "its geometry is computed in the graph")


def test_weight_that_is_cast_is_quantized() -> None:
    probe = GraphProbe(WithWeight(lambda x, w: F.linear(x.bfloat16(), w.to(torch.bfloat16)), 8, 8), ROWS).analyze()
    assert probe.info.quantized


def test_layers_are_numbered_in_graph_order_whether_wanted_or_not() -> None:
    probe = GraphProbe(net(), IMAGE, exclude=("blocks.0.to_q",)).analyze()
    assert [info.index for info in probe.infos] == list(range(7))
    candidates = [info for info in probe.infos if info.quantized]
    assert len(candidates) == 6
    assert all(info.reason == CANDIDATE for info in candidates)
    assert probe.after == probe.before
    probe.assert_settled(select_nodes)


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("above", [True, False])
def test_layer_below_the_density_threshold_stays_float(kind: str, above: bool) -> None:
    density = max(info.density for info in GraphProbe(Mixed(), IMAGE).analyze().infos if info.kind == kind)
    options: dict[str, Any] = {f"{kind}_compute_density_threshold": density * 1.01 if above else density}
    probe = GraphProbe(Mixed(), IMAGE, **options).analyze()
    names = [info.name for info in probe.infos if info.kind == kind and not info.quantized]
    assert names == ([] if not above else CONVS if kind == "conv" else LINEARS)
    for info in probe.infos:
        name = f"{info.kind}_compute_density_threshold"
        assert info.quantized or info.reason == f"density {density:.4g} is below {name}={density * 1.01:g}"


def test_default_thresholds_drop_what_they_are_made_for() -> None:
    """Of an SDXL block: cross-attention's k and v and the time embedding stay in float, by their density alone."""

    def linear(inputs: int, outputs: int, *rows: int) -> bool:
        with torch.device("meta"):
            module, x = nn.Linear(inputs, outputs).half(), torch.empty(*rows, inputs).half()
        defaults: dict[str, Any] = {"conv_compute_density_threshold": 100, "linear_compute_density_threshold": 300}
        return GraphProbe(module, x, **defaults).analyze().info.quantized

    assert linear(640, 640, 2, 4096)
    assert not linear(2048, 1280, 2, 77)
    assert not linear(320, 1280, 2)


def test_on_a_cpu_20_is_the_threshold() -> None:
    probe = GraphProbe(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 8)), torch.empty(512, 256)).analyze()
    probe.context.config = QuantConfig()
    probe.run(select_nodes)
    dense, thin = probe.infos
    assert dense.density > 20 > thin.density
    assert dense.quantized and not thin.quantized
    assert thin.reason.endswith("is below 20, the linear_compute_density_threshold for CPUs")


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(
    ("conv", "linear", "expected"),
    [(0, 100, LINEARS), (100, 0, CONVS), (0, 0, []), (100, 100, CONVS + LINEARS)],
)
def test_zero_percent_of_a_kind_is_none_of_it(conv: int, linear: int, expected: list[str], measured: bool) -> None:
    options: dict[str, Any] = {"quantized_conv_percentage": conv, "quantized_linear_percentage": linear}
    probe = GraphProbe(Mixed(), IMAGE, **options).analyze()
    if measured:
        probe.set_sensitivities(**SENSITIVITIES)
        probe.run(select_nodes)
    assert probe.quantized() == expected
    for info in probe.infos:
        assert info.quantized or info.reason == f"quantized_{info.kind}_percentage is 0"


@pytest.mark.parametrize(
    ("conv", "linear", "expected"),
    [
        (100, 100, CONVS + LINEARS),
        (50, 100, ["convs.1", *LINEARS]),
        (100, 75, [*CONVS, "linears.0", "linears.2", "linears.3"]),
        (50, 50, ["convs.1", "linears.0", "linears.2"]),
        (0, 25, ["linears.2"]),
        (100, 10, CONVS),
    ],
)
def test_percentages_keep_the_least_sensitive(conv: float, linear: float, expected: list[str]) -> None:
    options: dict[str, Any] = {"quantized_conv_percentage": conv, "quantized_linear_percentage": linear}
    probe = GraphProbe(Mixed(), IMAGE, **options).analyze()
    # Before anything is measured, nothing but 0 rules layers out.
    assert len(probe.quantized()) == (2 if conv else 0) + 4
    probe.set_sensitivities(**SENSITIVITIES)
    probe.run(select_nodes)
    assert probe.quantized() == expected
    assert all(info.reason == "selected" for info in probe.infos if info.quantized)
    probe.assert_settled(select_nodes)


def test_reason_tells_the_rank() -> None:
    probe = GraphProbe(Mixed(), IMAGE, quantized_linear_percentage=50).analyze()
    probe.set_sensitivities(**SENSITIVITIES)
    # Every decision changes: none is "being observed" any longer.
    assert probe.run(select_nodes) == {"select_nodes": 6}
    reasons = {info.name: info.reason for info in probe.infos}
    assert reasons["linears.1"] == "sensitivity 0.04 ranks 4 of 4; quantized_linear_percentage=50 keeps 2"
    assert reasons["linears.3"] == "sensitivity 0.03 ranks 3 of 4; quantized_linear_percentage=50 keeps 2"


@pytest.mark.parametrize("unmeasured", [None, float("nan")])
def test_layer_that_could_not_be_measured_counts_as_the_most_sensitive(unmeasured: float | None) -> None:
    probe = GraphProbe(Mixed(), IMAGE, quantized_linear_percentage=75).analyze()
    probe.set_sensitivities(**SENSITIVITIES)
    unknown = next(info for info in probe.infos if info.name == "linears.0")
    unknown.sensitivity = None if unmeasured is None else Sensitivity(unmeasured, unmeasured, unmeasured)
    probe.run(select_nodes)
    assert probe.quantized() == [*CONVS, "linears.1", "linears.2", "linears.3"]


def test_exclude_comes_after_percentages() -> None:
    probe = GraphProbe(Mixed(), IMAGE, quantized_linear_percentage=50, exclude=("*.2", "conv*")).analyze()
    assert probe.quantized() == ["linears.0", "linears.1", "linears.3"]
    probe.set_sensitivities(**SENSITIVITIES)
    probe.run(select_nodes)
    # linears.2 and linears.0 are the least sensitive; linears.3 does not move up into the free place.
    assert probe.quantized() == ["linears.0"]
    reasons = {info.name: info.reason for info in probe.infos}
    assert reasons["linears.2"] == "excluded by '*.2'"
    assert reasons["convs.0"] == "excluded by 'conv*'"


def test_float_precision_refuses_all_with_its_reason() -> None:
    probe = GraphProbe(Mixed(), IMAGE, precision=Precision("float", "the CPU is old")).analyze()
    assert probe.quantized() == []
    assert {info.reason for info in probe.infos} == {"float: the CPU is old"}


def test_layer_that_saw_no_finite_numbers_stays_float() -> None:
    probe = GraphProbe(Mixed(), IMAGE).analyze()
    probe.set_sensitivities(**SENSITIVITIES)
    probe.context.unusable = {"linears.1": "its input was not finite"}
    probe.run(select_nodes)
    (refused,) = [info for info in probe.infos if not info.quantized]
    assert (refused.name, refused.reason) == ("linears.1", "its input was not finite")


class Residual(nn.Module):
    """A residual block with a shortcut, between a first and a last layer of some channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, channels, 1)
        self.block, self.shortcut = nn.Conv2d(channels, 64, 5, padding=2), nn.Conv2d(channels, 64, 1)
        self.last = nn.Conv2d(64, channels // 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.contiguous().to(torch.float32))
        return self.last(self.block(x) + self.shortcut(x)).flatten(2)


class Wide(nn.Module):
    """Layers that are first and last and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


@pytest.mark.parametrize("precision", [EIGHT_BITS, *SYMMETRIC], ids=lambda precision: precision.name)
def test_what_is_quick_and_has_no_other_way_stays_in_float(precision: Precision) -> None:
    probe = GraphProbe(Residual(16), IMAGE, precision=precision).analyze()
    assert probe.quantized() == ["block"]
    reasons = {info.name: info.reason for info in probe.infos if not info.quantized}
    assert all("would cause most of the image's error" in reason for reason in reasons.values())
    for name, which in (("first", "first layer"), ("shortcut", "a shortcut"), ("last", "last layer")):
        assert which in reasons[name]


def test_much_work_is_done_in_8_bit_even_first_and_last() -> None:
    assert GraphProbe(Wide(), IMAGE).analyze().quantized() == ["first", "last"]
