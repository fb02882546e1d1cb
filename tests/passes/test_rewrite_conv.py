from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend import ops
from onlinequant_backend.passes.quantize_inputs import quantize_inputs
from onlinequant_backend.passes.rewrite_conv import rewrite_conv
from tests.helpers.graph_probe import GraphProbe, WithWeight, host_precision
from tests.helpers.tiny import noise, relative_error

IMAGE = (2, 16, 9, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "shape", "geometry"),
    [
        pytest.param(nn.Conv2d(16, 8, 3, padding=1), IMAGE, ([1, 1], [1, 1], [1, 1]), id="3x3"),
        pytest.param(nn.Conv2d(16, 8, 1, bias=False), IMAGE, ([1, 1], [0, 0], [1, 1]), id="1x1 without bias"),
        pytest.param(nn.Conv2d(16, 8, 3, 2, 1), IMAGE, ([2, 2], [1, 1], [1, 1]), id="stride"),
        pytest.param(nn.Conv2d(16, 8, 3, padding=2, dilation=2), IMAGE, ([1, 1], [2, 2], [2, 2]), id="dilation"),
        pytest.param(nn.Conv2d(16, 8, (3, 1), padding="same"), IMAGE, ([1, 1], [1, 0], [1, 1]), id="same"),
        pytest.param(nn.Conv2d(16, 8, 3, padding="valid"), IMAGE, ([1, 1], [0, 0], [1, 1]), id="valid"),
        pytest.param(nn.Conv2d(16, 8, 3, padding=1).half(), IMAGE, ([1, 1], [1, 1], [1, 1]), id="fp16"),
        pytest.param(nn.Conv2d(16, 8, 3, padding=1).bfloat16(), IMAGE, ([1, 1], [1, 1], [1, 1]), id="bf16"),
        pytest.param(
            WithWeight(lambda x, w: F.conv2d(padding=1, bias=w.sum((1, 2, 3)), weight=w, input=x), 8, 16, 3, 3),
            IMAGE,
            ([1, 1], [1, 1], [1, 1]),
            id="keywords",
        ),
        pytest.param(
            nn.Conv3d(16, 8, (3, 1, 1), padding=(1, 0, 0)),
            (1, 16, 5, 4, 4),
            ([1, 1, 1], [1, 0, 0], [1, 1, 1]),
            id="over time",
        ),
    ],
)
def test_convolution_becomes_the_8_bit_op(module: nn.Module, shape: tuple[int, ...], geometry: tuple[Any, ...]) -> None:
    dtype = next(module.parameters()).dtype
    x = noise(*shape, dtype=dtype)
    probe = GraphProbe(module, x, precision=host_precision()).analyze()
    layers = probe.observe()
    probe.run(quantize_inputs)
    assert probe.run(rewrite_conv) == {"rewrite_conv": 1}
    float_convs = probe.added(torch.conv2d) + probe.added(torch.conv3d)
    assert (float_convs, probe.added(ops.conv), probe.added("placeholder")) == (-1, 1, 2)
    assert probe.context.extra_inputs == [("qparams", 0), ("weight", 0), ("weight_scale", 0)]

    (node,) = probe.nodes(ops.conv)
    assert node.args[5:] == (*geometry, dtype)
    assert node.meta["onlinequant"] is probe.info
    (result,) = probe.call_quantized(layers)
    expected = module(x)
    assert (result.dtype, result.shape) == (dtype, expected.shape)
    assert 0 < relative_error(result, expected) < 0.05
    probe.assert_settled(rewrite_conv)


def test_grouped_convolution_is_left_alone() -> None:
    probe = GraphProbe(nn.Conv2d(4, 4, 1, groups=4), noise(1, 4, 8, 8)).analyze()
    assert probe.run(quantize_inputs, rewrite_conv) == {"quantize_inputs": 0, "rewrite_conv": 0}
    assert probe.after == probe.before
    assert probe.info.reason == "grouped convolutions (groups=4) have no 8-bit kernel"


def test_linear_is_left_alone() -> None:
    probe = GraphProbe(nn.Linear(8, 8), noise(2, 8)).analyze()
    probe.run(quantize_inputs)
    probe.assert_settled(rewrite_conv)
    assert probe.after.counts[torch._C._nn.linear] == 1
