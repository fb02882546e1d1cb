from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import nn

from onlinequant_backend import ops
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.passes.fuse_channel_add import fuse_channel_add
from onlinequant_backend.passes.quantize_inputs import quantize_inputs
from onlinequant_backend.passes.rewrite_conv import rewrite_conv
from tests.helpers.graph_probe import EIGHT_BITS, SYMMETRIC, GraphProbe
from tests.helpers.tiny import noise, relative_error

FLATTEN = torch.ops.aten.flatten.using_ints
X, TIME = noise(2, 8, 6, 5), noise(2, 8, seed=2)
precisions = pytest.mark.parametrize("precision", SYMMETRIC, ids=lambda precision: precision.format.name)
Combine = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """A few convolutions, and what ``combine`` makes of an image and a time embedding."""

    def __init__(self, combine: Combine) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 1)
        self.temporal = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))
        self.combine = combine
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.combine(self, x, time)


def spread(time: torch.Tensor) -> torch.Tensor:
    return time[:, :, None, None]


def rewritten(combine: Combine, precision: Precision = SYMMETRIC[1]) -> GraphProbe:
    """A graph of 8-bit convolutions, before fusing."""
    probe = GraphProbe(Block(combine), X, TIME, precision=precision).analyze()
    probe.run(quantize_inputs, rewrite_conv)
    return probe


def res_block(module: nn.Module, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    h = module.conv(x) + spread(time)
    return x + module.other(h.relu())


def video(module: nn.Module, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    frames = x[:, :, None].expand(-1, -1, 4, -1, -1)
    return module.temporal(frames) + time[:, :, None, None, None]


def in_place(module: nn.Module, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    h = module.conv(x)
    h += spread(time)
    return h


@precisions
@pytest.mark.parametrize(
    ("combine", "fused"),
    [
        pytest.param(res_block, 1, id="ResBlock"),
        pytest.param(in_place, 1, id="in place"),
        pytest.param(lambda m, x, t: torch.add(spread(t), m.conv(x)), 1, id="on the left"),
        pytest.param(lambda m, x, t: m.conv(x) + x.mean((2, 3), keepdim=True), 1, id="mean"),
        pytest.param(lambda m, x, t: m.conv(x) + spread(t) + spread(t * 2), 1, id="two of them"),
        pytest.param(lambda m, x, t: m.other(m.conv(x) + spread(t)) + spread(t), 2, id="two convolutions"),
        pytest.param(video, 1, id="over time"),
    ],
)
def test_what_is_added_goes_into_the_convolution(combine: Combine, fused: int, precision: Precision) -> None:
    module = Block(combine)
    probe = GraphProbe(module, X, TIME, precision=precision).analyze()
    layers = probe.observe()
    probe.run(quantize_inputs, rewrite_conv)
    (expected,) = probe.call_quantized(layers)

    assert probe.run(fuse_channel_add) == {"fuse_channel_add": fused}
    assert probe.added(operator.add) + probe.added(torch.add) == -fused
    assert (probe.added(ops.conv), probe.added(FLATTEN), probe.added("placeholder")) == (0, fused, 0)
    (result,) = probe.call_quantized(layers)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert relative_error(result, expected) < 1e-5
    assert 0 < relative_error(result, module(X, TIME)) < 0.05
    probe.assert_settled(fuse_channel_add)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    module = Block(res_block).to(dtype)
    inputs = X.to(dtype), TIME.to(dtype)
    probe = GraphProbe(module, *inputs, precision=SYMMETRIC[0]).analyze()
    layers = probe.observe()
    assert probe.run(quantize_inputs, rewrite_conv, fuse_channel_add)["fuse_channel_add"] == 1
    (result,) = probe.call_quantized(layers)
    assert result.dtype is dtype
    assert relative_error(result, module(*inputs)) < 0.05


def read_twice(module: nn.Module, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    h = module.conv(x)
    return (h + spread(time)) * h


def doubled(module: nn.Module, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    h = module.conv(x)
    return h + h


@pytest.mark.parametrize(
    "combine",
    [
        read_twice,
        doubled,
        pytest.param(lambda m, x, t: m.conv(x).add_(spread(t)), id="in place by a method"),
        pytest.param(lambda m, x, t: m.wide(x) + spread(t), id="1x1"),
        pytest.param(lambda m, x, t: m.conv(x) + x, id="residual"),
        pytest.param(lambda m, x, t: m.conv(x) + 1, id="number"),
        pytest.param(lambda m, x, t: torch.add(m.conv(x), spread(t), alpha=2), id="alpha"),
        pytest.param(lambda m, x, t: m.conv(x) + t[0, :, None, None], id="without images"),
        pytest.param(lambda m, x, t: m.conv(x) + spread(t[:1]), id="one image"),
        pytest.param(lambda m, x, t: m.conv(x) + spread(t[:, :1]), id="one channel"),
        pytest.param(lambda m, x, t: m.conv(x) + x[..., :1], id="one column"),
        pytest.param(lambda m, x, t: m.conv(x[:1]) + spread(t), id="more images than the convolution has"),
        pytest.param(lambda m, x, t: m.conv(x) + spread(t).double(), id="wider"),
        pytest.param(lambda m, x, t: m.conv(x) + spread(t).bfloat16(), id="narrower"),
        pytest.param(lambda m, x, t: m.conv(x) - spread(t), id="difference"),
    ],
)
def test_what_differs_is_left_alone(combine: Combine) -> None:
    probe = rewritten(combine)
    assert len(probe.nodes(ops.conv)) == 1
    probe.assert_settled(fuse_channel_add)


def test_packed_weights_are_left_alone() -> None:
    rewritten(res_block, precision=EIGHT_BITS).assert_settled(fuse_channel_add)
