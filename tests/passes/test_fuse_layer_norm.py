from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from onlinequant_backend import ops
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.passes.fuse_layer_norm import fuse_layer_norm
from onlinequant_backend.passes.quantize_inputs import quantize_inputs
from onlinequant_backend.passes.rewrite_linear import rewrite_linear
from tests.helpers.graph_probe import SYMMETRIC, GraphProbe
from tests.helpers.tiny import noise, relative_error

X = noise(2, 6, 32)
Normalize = Callable[[nn.LayerNorm, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
precisions = pytest.mark.parametrize("precision", SYMMETRIC, ids=lambda precision: precision.format.name)


class Block(nn.Module):
    """A linear that reads a normalized tensor, and whoever else reads the tensor before it was."""

    def __init__(self, normalize: Normalize, affine: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32, elementwise_affine=affine)
        self.linear = nn.Linear(32, 32)
        self.normalize = normalize
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, normalized = self.normalize(self.norm, x)
        return before + self.linear(normalized)


def plain(norm: nn.LayerNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, norm(x)


def with_residual(norm: nn.LayerNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + x.flip(0)
    return total, norm(total)


def after_another_reader(norm: nn.LayerNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + x.flip(0)
    doubled = total * 2
    return doubled, norm(total)


def broadcast(norm: nn.LayerNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + x[:1]
    return total, norm(total)


def written_before(norm: nn.LayerNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + x.flip(0)
    total.mul_(3).add_(1)
    return total, norm(total)


@precisions
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("normalize", "adds"),
    [(plain, False), (with_residual, True), (after_another_reader, True), (broadcast, False), (written_before, False)],
)
def test_norm_and_quantize_become_one_op(normalize: Normalize, adds: bool, affine: bool, precision: Precision) -> None:
    module = Block(normalize, affine)
    probe = GraphProbe(module, X, precision=precision).analyze()
    layers = probe.observe()
    probe.run(quantize_inputs, rewrite_linear)
    (expected,) = probe.call_quantized(layers)
    assert probe.run(fuse_layer_norm) == {"fuse_layer_norm": 1}
    (node,) = probe.nodes(ops.layer_norm)
    assert (node.args[1] is not None) == adds
    assert not probe.nodes(ops.quantize)
    (result,) = probe.call_quantized(layers)
    assert relative_error(result, expected) < 0.01  # what lies between two steps may go to either
    assert relative_error(result, module(X)) < 0.05
    probe.assert_settled(fuse_layer_norm)


def read_twice(norm: nn.LayerNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    normalized = norm(x)
    return normalized, normalized


def over_two_dimensions(_norm: nn.LayerNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, torch.nn.functional.layer_norm(x, x.shape[1:])


@pytest.mark.parametrize("normalize", [read_twice, over_two_dimensions])
def test_what_is_left_alone(normalize: Normalize) -> None:
    probe = GraphProbe(Block(normalize), X, precision=SYMMETRIC[1]).analyze()
    probe.run(quantize_inputs, rewrite_linear)
    assert probe.run(fuse_layer_norm) == {"fuse_layer_norm": 0}


def test_packed_formats_have_no_such_kernel() -> None:
    probe = GraphProbe(Block(with_residual), X).analyze()
    probe.run(quantize_inputs, rewrite_linear)
    assert probe.run(fuse_layer_norm) == {"fuse_layer_norm": 0}
