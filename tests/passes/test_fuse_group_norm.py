from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch._aot_autograd.autograd_cache import check_cacheable

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils, specialization
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.passes import REWRITE
from onlinequant_backend.passes.drop_identities import drop_identities
from onlinequant_backend.passes.fuse_group_norm import fuse_group_norm
from onlinequant_backend.passes.quantize_inputs import quantize_inputs
from onlinequant_backend.passes.rewrite_conv import rewrite_conv
from onlinequant_backend.passes.rewrite_linear import rewrite_linear
from tests.helpers.graph_probe import SYMMETRIC, GraphProbe, host_precision
from tests.helpers.tiny import noise, relative_error

PREPARE = (quantize_inputs, rewrite_linear, rewrite_conv, drop_identities)
X = noise(2, 20, 6, 5)
Between = Callable[[torch.Tensor], torch.Tensor]
precisions = pytest.mark.parametrize("precision", SYMMETRIC, ids=lambda precision: precision.format.name)


class Normed(nn.Module):
    """GroupNorm, what ``between`` makes of it, and a layer that reads that."""

    def __init__(self, between: Between, layer: nn.Module | None = None, affine: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.GroupNorm(4, 20, eps=1e-3, affine=affine)
        if affine:
            nn.init.normal_(self.norm.weight, 1)
            nn.init.normal_(self.norm.bias)
        self.layer = nn.Conv2d(20, 8, 3, padding=1) if layer is None else layer
        self.between = between
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.between(self.norm(x)))


def nothing(y: torch.Tensor) -> torch.Tensor:
    return y


def in_place(y: torch.Tensor) -> torch.Tensor:
    return F.silu(y, inplace=True)


def with_dropout(y: torch.Tensor) -> torch.Tensor:
    return F.dropout(F.silu(y), 0.5, training=False)


def diffusers_rows(y: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = y.shape
    return y.permute(0, 2, 3, 1).reshape(batch, height * width, channels)


def comfy_rows(y: torch.Tensor) -> torch.Tensor:
    return y.movedim(1, 3).flatten(1, 2).contiguous()


def rows_by_function(y: torch.Tensor) -> torch.Tensor:
    return torch.transpose(torch.flatten(y, 2), 1, 2)


@torch.no_grad()
def fused(module: nn.Module, x: torch.Tensor, precision: Precision) -> GraphProbe:
    """A graph whose one norm was fused, and whose numbers are what they were."""
    probe = GraphProbe(module, x, precision=precision).analyze()
    layers = probe.observe()
    probe.run(*PREPARE)
    (expected,) = probe.call_quantized(layers)
    assert probe.run(fuse_group_norm) == {"fuse_group_norm": 1}
    assert (probe.added(ops.quantize), probe.added(F.group_norm), probe.added(ops.group_norm)) == (-1, -1, 1)
    (result,) = probe.call_quantized(layers)
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    assert relative_error(result, expected) < 0.02  # what lies between two steps may go to either
    assert 0 < relative_error(result, module(x)) < 0.05
    probe.assert_settled(fuse_group_norm)
    return probe


@precisions
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("between", [nothing, F.silu, nn.SiLU(), in_place, with_dropout])
def test_norm_of_an_image_becomes_one_op(between: Between, affine: bool, precision: Precision) -> None:
    probe = fused(Normed(between, affine=affine), X, precision)
    assert not probe.nodes(F.silu)
    (norm,) = probe.nodes(ops.group_norm)
    _, groups, weight, bias, *rest = (str(argument) for argument in norm.args)
    assert (groups, weight == "None", bias == "None") == ("4", not affine, not affine)
    silu = str(between is not nothing)
    assert rest == ["0.001", silu, "onlinequant_qparams_0", str(precision.format.activation)]
    assert probe.nodes(ops.conv)[0].args[0] is norm


@precisions
@pytest.mark.parametrize("rows", [diffusers_rows, comfy_rows, rows_by_function])
def test_rows_of_an_image_are_made_after_the_op(rows: Between, precision: Precision) -> None:
    probe = fused(Normed(rows, nn.Linear(20, 8)), X, precision)
    (linear,) = probe.nodes(ops.linear)
    xq = linear.args[0]
    assert isinstance(xq, torch.fx.Node) and xq.target is torch.ops.aten.contiguous.default
    (norm,) = probe.nodes(ops.group_norm)
    assert norm.args[5] is False
    # The rows lie in memory as the norm writes them.
    y = torch.empty(X.shape).contiguous(memory_format=torch.channels_last)
    assert rows(y).data_ptr() == y.data_ptr()
    # What AOTAutograd does not cache, a warm start would trace again.
    check_cacheable(probe.graph_module)
    assert all(fx_utils.example(node).dtype is norm.args[-1] for node in (norm, *norm.users))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    fused(Normed(F.silu).to(dtype), X.to(dtype), SYMMETRIC[0])


def test_video() -> None:
    fused(Normed(F.silu, nn.Conv3d(20, 8, (3, 1, 1))), noise(1, 20, 4, 3, 3), SYMMETRIC[0])


def test_layers_share_the_result() -> None:
    class Shared(Normed):
        def __init__(self) -> None:
            super().__init__(F.silu)
            self.second = nn.Conv2d(20, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.between(self.norm(x))
            return self.layer(y) + self.second(y)

    fused(Shared(), X, SYMMETRIC[0])


def test_input_that_is_written_to_afterwards() -> None:
    class Writing(Normed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            y = self.norm(x)
            x.add_(100)
            return self.layer(F.silu(y)) + x.mean()

    module = Writing(nothing)
    probe = GraphProbe(module, X, precision=SYMMETRIC[0]).analyze()
    layers = probe.observe()
    assert probe.run(*PREPARE, fuse_group_norm)["fuse_group_norm"] == 1
    (result,) = probe.call_quantized(layers)
    assert relative_error(result - 100, module(X) - 100) < 0.05


class ReadsNorm(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.layer(F.silu(y)) + y.mean()


class ReadsSilu(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.norm(x))
        return self.layer(y) + y.mean()


class ReadsRows(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = diffusers_rows(self.norm(x))
        return self.layer(y) + y.mean()


@pytest.mark.parametrize(
    ("module", "x"),
    [
        pytest.param(Normed(F.gelu), X, id="another activation"),
        pytest.param(Normed(lambda y: F.silu(y) * 2), X, id="something in between"),
        pytest.param(Normed(lambda y: F.dropout(y, 0.5, training=True)), X, id="dropout that drops"),
        pytest.param(ReadsNorm(nothing), X, id="norm read twice"),
        pytest.param(ReadsSilu(nothing), X, id="SiLU read twice"),
        pytest.param(ReadsRows(nothing, nn.Linear(20, 8)), X, id="rows read twice"),
        pytest.param(Normed(lambda y: y.flatten(2, 3)[..., None]), X, id="reshaped before a convolution"),
        pytest.param(Normed(nothing, nn.Linear(6, 8)), noise(2, 20, 6), id="three dimensions"),
        pytest.param(Normed(F.silu, nn.Identity()), X, id="no layer"),
    ],
)
def test_what_differs_is_left_alone(module: nn.Module, x: torch.Tensor) -> None:
    probe = GraphProbe(module, x, precision=SYMMETRIC[0]).analyze()
    probe.run(*PREPARE)
    assert len(probe.nodes(F.group_norm)) == 1
    probe.assert_settled(fuse_group_norm)


def test_float64_is_left_alone() -> None:
    probe = GraphProbe(Normed(F.silu).double(), X.double(), precision=SYMMETRIC[0]).analyze()
    probe.run(*PREPARE)
    probe.assert_settled(fuse_group_norm)


def test_packed_formats_are_left_alone() -> None:
    probe = GraphProbe(Normed(F.silu), X, precision=host_precision()).analyze()
    probe.run(*PREPARE)
    assert len(probe.nodes(ops.quantize)) == 1
    probe.assert_settled(fuse_group_norm)


def test_all_passes_with_symbolic_sizes() -> None:
    module = Normed(diffusers_rows, nn.Linear(20, 8))
    probe = GraphProbe(module, X, precision=SYMMETRIC[0], dynamic=True).analyze()
    specialization.specialize(probe.graph_module, list(probe.inputs.values()), sizes=False)  # eps was an input
    layers = probe.observe()
    assert probe.run(*REWRITE)["fuse_group_norm"] == 1
    (result,) = probe.call_quantized(layers)
    assert 0 < relative_error(result, module(X)) < 0.05
