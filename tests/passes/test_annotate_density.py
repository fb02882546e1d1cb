from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend.passes import ANALYZE
from onlinequant_backend.passes.annotate_density import annotate_density
from onlinequant_backend.passes.name_layers import name_layers
from tests.helpers.graph_probe import GraphProbe, WithWeight
from tests.helpers.tiny import noise


@pytest.mark.parametrize(
    ("module", "shape", "flops", "elements"),
    [
        pytest.param(nn.Linear(8, 4), (3, 5, 8), 2 * 15 * 8 * 4, 15 * 8 + 8 * 4 + 15 * 4, id="linear"),
        pytest.param(nn.Conv2d(3, 5, 1), (2, 3, 7, 9), 2 * 2 * 63 * 3 * 5, 2 * 63 * 3 + 3 * 5 + 2 * 63 * 5, id="1x1"),
        pytest.param(
            nn.Conv2d(3, 5, 3, stride=2, padding=1),
            (1, 3, 8, 8),
            2 * 16 * 5 * 27,
            3 * 64 + 5 * 27 + 5 * 16,
            id="3x3 with stride 2",
        ),
        pytest.param(
            nn.Conv2d(3, 5, 3, dilation=2), (1, 3, 8, 8), 2 * 16 * 5 * 27, 3 * 64 + 5 * 27 + 5 * 16, id="dilation 2"
        ),
        pytest.param(
            nn.Conv2d(6, 4, 3, padding="same", groups=2),
            (1, 6, 5, 5),
            2 * 25 * 4 * 27,
            6 * 25 + 4 * 27 + 4 * 25,
            id="groups",
        ),
        pytest.param(
            nn.Conv3d(3, 5, (3, 1, 1), padding=(1, 0, 0)),
            (1, 3, 4, 2, 2),
            2 * 16 * 5 * 9,
            3 * 16 + 5 * 9 + 5 * 16,
            id="3-d",
        ),
        pytest.param(nn.Conv1d(3, 5, 3), (1, 3, 10), 2 * 8 * 5 * 9, 3 * 10 + 5 * 9 + 5 * 8, id="1-d"),
        pytest.param(
            nn.ConvTranspose2d(3, 5, 2, stride=2),
            (1, 3, 4, 4),
            2 * 16 * 3 * 5 * 4,
            3 * 16 + 3 * 5 * 4 + 5 * 64,
            id="transposed",
        ),
    ],
)
def test_flops_and_bytes(module: nn.Module, shape: tuple[int, ...], flops: int, elements: int) -> None:
    probe = GraphProbe(module, noise(*shape))
    assert probe.run(name_layers, annotate_density)["annotate_density"] == 1
    info = probe.info
    assert (info.flops, info.bytes, info.density) == (flops, 4 * elements, flops / (4 * elements))
    assert info.input_shape == shape
    assert info.weight_shape == tuple(next(module.parameters()).shape)
    assert probe.after == probe.before
    probe.assert_settled(annotate_density)


def test_every_tensor_counts_in_its_own_dtype() -> None:
    # The product reads the cast weight. Under autocast, input and output differ.
    module = WithWeight(lambda x, w: F.linear(x.half(), w.half()).float(), 4, 8)
    assert GraphProbe(module, noise(3, 8)).analyze().info.bytes == 2 * (24 + 32 + 12)

    def autocast(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, w)

    assert GraphProbe(WithWeight(autocast, 4, 8), noise(3, 8)).analyze().info.bytes == 4 * (24 + 32) + 2 * 12


def test_symbolic_sizes_count_as_traced() -> None:
    probe = GraphProbe(nn.Linear(8, 4), noise(3, 5, 8), dynamic=True).analyze()
    assert probe.info.input_shape == (3, 5, 8)
    assert probe.info.output_shape == (3, 5, 4)
    assert all(type(size) is int for size in probe.info.input_shape)


@pytest.mark.parametrize(
    ("layer", "features", "shape", "density"),
    [
        pytest.param(nn.Conv2d, (320, 320, 3, 1, 1), (2, 320, 128, 128), 1379.38, id="convolution"),
        pytest.param(nn.Conv2d, (4, 320, 3, 1, 1), (2, 4, 128, 128), 35.52, id="conv_in"),
        pytest.param(nn.Conv2d, (320, 4, 3, 1, 1), (2, 320, 128, 128), 35.52, id="conv_out"),
        pytest.param(nn.Linear, (640, 640), (2, 4096, 640), 307.97, id="linear over 8192 rows"),
        pytest.param(nn.Linear, (1280, 1280), (2, 1024, 1280), 487.62, id="linear over 2048 rows"),
        pytest.param(nn.Linear, (2048, 1280), (2, 77, 2048), 128.82, id="cross-attention k and v"),
        pytest.param(nn.Linear, (320, 1280), (2, 320), 1.98, id="time embedding"),
    ],
)
def test_densities_of_sdxl(
    layer: type[nn.Module], features: tuple[int, ...], shape: tuple[int, ...], density: float
) -> None:
    """The table that the default thresholds are made for: fp16, CFG batch 2, 1024x1024."""
    module = layer(*features, device="meta", dtype=torch.float16)
    probe = GraphProbe(module, torch.empty(shape, device="meta", dtype=torch.float16)).analyze()
    assert round(probe.info.density, 2) == density


def test_layer_without_rows_is_measured_once() -> None:
    probe = GraphProbe(nn.Linear(8, 4), noise(0, 8))
    assert probe.run(name_layers, annotate_density)["annotate_density"] == 1
    assert (probe.info.flops, probe.info.output_shape) == (0, (0, 4))
    probe.assert_settled(annotate_density)


def test_unknown_shape_is_refused() -> None:
    probe = GraphProbe(nn.Linear(8, 4), noise(3, 8))
    (node,) = probe.nodes(torch._C._nn.linear)
    del node.meta["example_value"]
    assert probe.run(*ANALYZE)["annotate_density"] == 0
    assert (probe.info.flops, probe.info.quantized, probe.info.reason) == (0, False, "its shapes are not known")
