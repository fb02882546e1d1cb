from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend import ops
from onlinequant_backend.passes.quantize_inputs import quantize_inputs
from onlinequant_backend.passes.rewrite_linear import rewrite_linear
from tests.helpers.graph_probe import GraphProbe, WithWeight, host_precision
from tests.helpers.tiny import noise, relative_error

LINEAR = torch._C._nn.linear


def autocast(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, w)


def cast(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x.half(), w.half())


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "shape", "dtype"),
    [
        pytest.param(nn.Linear(48, 24), (2, 16, 48), torch.float32, id="rows"),
        pytest.param(nn.Linear(48, 24, bias=False), (48,), torch.float32, id="vector without bias"),
        pytest.param(nn.Linear(48, 24).bfloat16(), (2, 4, 4, 48), torch.bfloat16, id="bf16"),
        pytest.param(nn.Linear(48, 24).half(), (16, 48), torch.float16, id="fp16"),
        pytest.param(WithWeight(autocast, 24, 48), (16, 48), torch.bfloat16, id="autocast"),
        pytest.param(WithWeight(cast, 24, 48), (16, 48), torch.float16, id="cast weight"),
        pytest.param(
            WithWeight(lambda x, w: F.linear(weight=w, bias=w.sum(1), input=x), 24, 48),
            (16, 48),
            torch.float32,
            id="keywords",
        ),
    ],
)
def test_linear_becomes_the_8_bit_op(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = noise(*shape, dtype=next(module.parameters()).dtype)
    probe = GraphProbe(module, x, precision=host_precision()).analyze()
    layers = probe.observe()
    probe.run(quantize_inputs)
    assert probe.run(rewrite_linear) == {"rewrite_linear": 1}
    assert (probe.added(LINEAR), probe.added(ops.linear), probe.added("placeholder")) == (-1, 1, 2)
    assert probe.context.extra_inputs == [("qparams", 0), ("weight", 0), ("weight_scale", 0)]

    (node,) = probe.nodes(ops.linear)
    assert node.args[-1] is dtype
    assert node.meta["onlinequant"] is probe.info
    (result,) = probe.call_quantized(layers)
    expected = module(x)
    assert (result.dtype, result.shape) == (dtype, expected.shape)
    assert 0 < relative_error(result, expected) < 0.05
    probe.assert_settled(rewrite_linear)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (WithWeight(lambda x, w: F.linear(x, w - 1), 8, 8), "its weight is computed in the graph, not a parameter"),
        (
            WithWeight(lambda x, w: F.linear(x.to(w.dtype), w), 8, 8, dtype=torch.float64),
            "its dtype torch.float64 has no 8-bit kernel",
        ),
    ],
)
def test_linear_that_stays_float_is_left_alone(module: nn.Module, reason: str) -> None:
    probe = GraphProbe(module, noise(2, 8)).analyze()
    assert probe.run(quantize_inputs, rewrite_linear) == {"quantize_inputs": 0, "rewrite_linear": 0}
    assert (probe.after, probe.info.reason) == (probe.before, reason)


def test_convolution_is_left_alone() -> None:
    probe = GraphProbe(nn.Conv2d(4, 4, 1), noise(1, 4, 8, 8)).analyze()
    probe.run(quantize_inputs)
    probe.assert_settled(rewrite_linear)
    assert probe.after.counts[torch.conv2d] == 1
