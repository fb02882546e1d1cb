"""Weights that lie in one tensor: products, changes of one of them, and values that are not finite."""

from __future__ import annotations

import copy
import threading
import unittest.mock
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend import ops
from onlinequant_backend.compilation import build, compiled_graph
from onlinequant_backend.compilation.compiled_graph import CompiledGraph
from onlinequant_backend.graph import ConvGeometry
from onlinequant_backend.kernels import formats
from onlinequant_backend.kernels.formats import FP8, INT8, Format
from onlinequant_backend.quantization.layer_registry import known_layers
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.quantization.merged_weight import MergedWeight
from onlinequant_backend.quantization.weight_copy import Call, Copy, make_room
from onlinequant_backend.quantization.weight_quantization import quantize_weight
from onlinequant_backend.quantization.weight_set import WeightSet
from onlinequant_backend.runtime.set_registry import known_sets
from tests.helpers.eager_inductor import EagerInductor, dynamo_graphs
from tests.helpers.graph_probe import host_precision
from tests.helpers.small import CLOSE, compiled
from tests.helpers.tiny import OPTIONS, noise, relative_error

SYMMETRIC = [pytest.param(format, id=format.name) for format in (INT8, FP8)]
ROWS = (24, 24, 8)
X = noise(16, 32)


def new_weights(factors: Sequence[float] = (1, 1, 1)) -> list[nn.Parameter]:
    """Three of different sizes, the largest value of each being its factor."""
    weights = [noise(rows, 32, seed=seed) for seed, rows in enumerate(ROWS)]
    return [
        nn.Parameter(weight / weight.abs().max() * factor, requires_grad=False)
        for weight, factor in zip(weights, factors, strict=True)
    ]


def selected(
    weights: Sequence[torch.Tensor], format: Format = FP8, together: Sequence[Sequence[int]] = ()
) -> WeightSet:
    """A set whose layers have seen an input and run in 8 bit."""
    layers = [known_layers.layer(weight, None, format, "minmax") for weight in weights]
    for layer in layers:
        layer.observed.update(X)
    names = [str(i) for i in range(len(weights))]
    made = WeightSet(weights, names, range(len(weights)), layers, layout=0, together=together)
    known_sets.add(made)
    made.select(weights, range(len(weights)))
    return made


def merge(made: WeightSet, indices: tuple[int, ...] = (0, 1, 2)) -> MergedWeight:
    merged = made.merge(indices)
    assert merged is not None
    return merged


def dequantized(weight: torch.Tensor | None, scale: torch.Tensor | None) -> torch.Tensor:
    assert weight is not None and scale is not None
    return weight.double() * scale.double()[:, None]


def assert_near(merged: MergedWeight, weights: Sequence[torch.Tensor]) -> None:
    """The merged weight is what quantizing each alone would give, up to what a larger scale loses."""
    parts = dequantized(merged.weight, merged.weight_scale).split([len(weight) for weight in weights])
    for layer, part, weight in zip(merged.copies, parts, weights, strict=True):
        assert torch.equal(dequantized(layer.weight, layer.weight_scale), part)
        assert relative_error(part, weight) < 0.04


def storage(tensor: torch.Tensor | None) -> int:
    assert tensor is not None
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("format", SYMMETRIC)
def test_one_product_of_merged_weights_is_what_several_are(format: Format) -> None:
    weights = new_weights((1, 0.3, 5))
    made = selected(weights, format)
    qparams = made.layers[0].qparams
    xq = ops.quantize(X, qparams, format.activation, False)
    separate = [ops.linear(xq, qparams, each.weight, each.weight_scale, None, torch.float32) for each in made.layers]
    merged = merge(made)
    product = ops.linear(xq, qparams, merged.weight, merged.weight_scale, None, torch.float32)
    for part, expected in zip(product.split(ROWS, -1), separate, strict=True):
        assert relative_error(part, expected) < 1e-3
    assert merged.weight_scale.shape == ((1,) if format is FP8 else (sum(ROWS),))
    assert merged.weight.dtype is format.weight


@pytest.mark.parametrize("format", SYMMETRIC)
def test_layers_have_views_of_the_merged_tensors(format: Format) -> None:
    weights = new_weights((1, 2, 3))
    made = selected(weights, format)
    before = [(layer.weight, layer.weight_scale) for layer in made.layers]
    merged = merge(made)
    assert merge(made) is merged
    for layer, (weight, scale) in zip(made.layers, before, strict=True):
        assert layer.copy.merged is merged
        assert storage(layer.weight) == storage(merged.weight) != storage(weight)
        assert storage(layer.weight_scale) == storage(merged.weight_scale) != storage(scale)
        if format is INT8:
            assert torch.equal(dequantized(layer.weight, layer.weight_scale), dequantized(weight, scale))


@pytest.mark.parametrize("format", SYMMETRIC)
@pytest.mark.parametrize("factor", [1.001, 0.9, 40.0, 1 / 64])
def test_one_weight_that_changes_is_followed_in_place(factor: float, format: Format) -> None:
    weights = new_weights((1, 0.5, 0.25))
    made = selected(weights, format)
    merged = merge(made)
    tensors = (merged.weight, merged.weight_scale, merged.weight.data_ptr(), merged.weight_scale.data_ptr())
    for change in (factor, 1 / factor):
        weights[1].mul_(change)
        assert not made.is_current(weights)
        # All, where the scale of all shrinks: see below.
        assert made.follow(weights) in ((1, 3) if format is FP8 else (1,))
        assert made.is_current(weights)
        assert_near(merged, weights)
        assert made.follow(weights) == 0
    now = (merged.weight, merged.weight_scale, merged.weight.data_ptr(), merged.weight_scale.data_ptr())
    assert all(old is new or old == new for old, new in zip(tensors, now, strict=True))


def test_scale_that_grows_only_moves_the_exponents_of_the_others() -> None:
    weights = new_weights((1, 1, 1))
    made = selected(weights)
    merged = merge(made)
    others = [dequantized(layer.weight, layer.weight_scale) for layer in made.layers]
    stamps = [layer.copy._stamp for layer in made.layers]
    scale = float(merged.weight_scale)
    weights[1].mul_(16)
    made.follow(weights)
    assert float(merged.weight_scale) == 16 * scale
    for i in (0, 2):
        layer = made.layers[i]
        assert layer.copy._stamp is stamps[i]  # not quantized again
        now = dequantized(layer.weight, layer.weight_scale)
        normal = others[i].abs() >= 16 * scale * 2**-6
        assert torch.equal(now[normal], others[i][normal])
        assert ((now - others[i]).abs() <= 16 * scale * 2**-10).all()


def test_scale_that_shrinks_again_gives_the_others_back_what_they_lost() -> None:
    """A LoRA that was far too strong, and is taken away."""
    weights = new_weights((1, 1, 1))
    made = selected(weights)
    merged = merge(made)
    before = merged.weight.float().clone(), merged.weight_scale.clone()
    original = weights[1].clone()
    weights[1].mul_(2**16)
    made.follow(weights)
    assert relative_error(dequantized(made.layers[0].weight, merged.weight_scale), weights[0]) > 0.05
    weights[1].copy_(original)
    assert made.follow(weights) == 3
    assert torch.equal(merged.weight_scale, before[1])
    assert torch.equal(merged.weight.float(), before[0])
    assert made.is_current(weights)


def test_scale_that_shrinks_is_noticed_by_a_set_that_shares_some_of_the_layers() -> None:
    weights = new_weights((1, 1, 64))
    made = selected(weights)
    merged = merge(made)
    part = selected(weights[2:])
    assert made.follow(weights) == 0
    weights[2].div_(64)
    assert part.follow(weights[2:]) == 1
    assert not made.is_current(weights)
    made.follow(weights)
    assert torch.equal(merged.weight.float()[:24], quantize_weight(weights[0], FP8)[0].float())


@pytest.mark.parametrize("format", SYMMETRIC)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_value_that_is_not_finite_shows_until_it_is_repaired(broken: int, value: float, format: Format) -> None:
    weights = new_weights((1, 4, 0.25))
    made = selected(weights, format)
    merged = merge(made)
    before = merged.weight.float().clone(), merged.weight_scale.clone()
    original = weights[broken].clone()
    weights[broken][5, 7] = value
    # Also when another one changes meanwhile, before it or after it.
    for other in (None, 0, 1, 2):
        if other is not None:
            weights[other].mul_(1.0 if other == broken else 0.99)
        made.follow(weights)
        assert made.is_current(weights)
        y = torch.zeros(16, 1)
        result = made.layers[broken].quantized_output(X, None, y)
        assert not result[:, 5].isfinite().any()
        assert torch.isfinite(merged.weight.float()).all()
        if format is INT8:
            assert torch.isfinite(merged.weight_scale).sum() == sum(ROWS) - 1
    weights[broken].copy_(original)
    for i in range(3):
        if i != broken:
            weights[i].copy_(new_weights((1, 4, 0.25))[i])
    made.follow(weights)
    assert torch.equal(merged.weight_scale, before[1])
    assert torch.equal(merged.weight.float(), before[0])


def test_weights_that_are_all_broken_recover() -> None:
    weights = new_weights()
    made = selected(weights)
    merged = merge(made)
    originals = [weight.clone() for weight in weights]
    for weight in weights:
        weight.fill_(torch.nan)
    assert made.follow(weights) == 3
    assert merged.weight_scale.isnan().all()
    for weight, original in zip(weights, originals, strict=True):
        weight.copy_(original)
    assert made.follow(weights) == 3
    assert_near(merged, weights)


def test_merging_a_weight_that_is_broken_already() -> None:
    weights = new_weights()
    made = selected(weights)
    original = weights[1].clone()
    weights[1].fill_(torch.inf)
    made.follow(weights)
    merged = merge(made)
    assert not torch.isfinite(merged.weight_scale).any()
    weights[1].copy_(original)
    made.follow(weights)
    assert_near(merged, weights)


def test_weights_that_cannot_be_merged_are_refused() -> None:
    weights = new_weights()
    made = selected(weights)
    merged = merge(made, (0, 1))
    assert made.merge((0, 1, 2)) is None  # two are part of another already
    assert made.merge((1, 2)) is None
    assert made.merge((1, 0)) is None
    assert made.merge((0, 1)) is merged
    assert made.layers[2].copy.merged is None
    tied = new_weights()
    assert selected([tied[0], tied[0]]).merge((0, 1)) is None
    assert selected(new_weights(), host_precision().format).merge((0, 1)) is None


def test_another_model_that_shares_one_of_merged_weights_has_copies_of_its_own() -> None:
    """A compiled graph that has them merged serves both."""
    weights = new_weights()
    made = selected(weights)
    merged = merge(made)
    others = [*new_weights((3, 2, 1))[:2], weights[2]]
    other = selected(others)
    assert (other.layers[2], other.merge((0, 1, 2))) == (made.layers[2], None)
    graph = compiled_graph.CompiledGraph(lambda weight: weight, [], [("merged_weight", (0, 1, 2))])
    assert graph([], other).shape == merged.weight.shape == graph([], made).shape
    for each, its in ((made, weights), (other, others)):
        each.follow(its)
        assert each.follow(its) == 0
        assert_near(merge(each), its)
    assert merge(made) is merged


def test_what_another_thread_reads_is_not_written() -> None:
    weights = new_weights()
    made = selected(weights)
    merged = merge(made)
    read = merged.weight, merged.weight_scale, made.layers[0].qparams
    kept = [tensor.clone() for tensor in read]
    is_reading, is_over = threading.Event(), threading.Event()

    def call() -> None:
        with Call() as reading:
            reading.layers = made.layers
            is_reading.set()
            assert is_over.wait(60)

    thread = threading.Thread(target=call)
    thread.start()
    assert is_reading.wait(60)
    weights[1].mul_(8)
    assert made.follow(weights) == 1
    made.layers[0].refit(X * 5)
    is_over.set()
    thread.join()
    assert all(torch.equal(tensor.float(), before.float()) for tensor, before in zip(read, kept, strict=True))
    assert merged.weight is not read[0] and made.layers[0].qparams is not read[2]
    assert merge(made) is merged
    assert_near(merged, weights)


def test_extras_are_looked_up_again_after_merging() -> None:
    """Compiled graphs of other sets, too, hold tensors that the merged one replaces."""
    weights = new_weights()
    made, other = selected(weights), selected(weights[:1])
    graph = CompiledGraph(lambda weight: weight, [], [("weight", 0)])
    before = [graph.prepare(each) for each in (made, other)]
    merged = merge(made)
    for each in (made, other):
        assert not each.is_current(weights[: len(each.layers)])
        each.follow(weights[: len(each.layers)])
    after = [graph.prepare(each) for each in (made, other)]
    assert all(old.extras[0] is not new.extras[0] for old, new in zip(before, after, strict=True))
    assert all(new.extras[0] is each.layers[0].weight for new, each in zip(after, (made, other), strict=True))
    assert made.extra("merged_weight", (0, 1, 2)) is merged.weight
    assert made.extra("merged_weight_scale", (0, 1, 2)) is merged.weight_scale
    assert made.extra("weight", 2) is made.layers[2].weight
    merge(made)
    assert [graph.prepare(each) for each in (made, other)] == after


# --- Whole models ---


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    torch._dynamo.utils.counters.clear()


class Transformer(nn.Module):
    """A ResBlock, then self-attention, cross-attention and GEGLU, as in a UNet."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(16, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        for name in ("to_q", "to_k", "to_v", "cross_q"):
            setattr(self, name, nn.Linear(channels, channels, bias=False))
        self.cross_k, self.cross_v = nn.Linear(24, channels, bias=False), nn.Linear(24, channels, bias=False)
        self.geglu, self.out = nn.Linear(channels, 4 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm(x))) + self.time(time)[:, :, None, None]
        x = x + self.conv2(F.silu(h))
        rows = x.flatten(2).transpose(1, 2)
        y = self.norms[0](rows)
        rows = rows + F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        y = self.norms[1](rows)
        rows = rows + F.scaled_dot_product_attention(self.cross_q(y), self.cross_k(text), self.cross_v(text))
        value, gate = self.geglu(self.norms[2](rows)).chunk(2, dim=-1)
        rows = rows + self.out(value * F.gelu(gate))
        return rows.transpose(1, 2).reshape(x.shape)


INPUTS = (noise(2, 16, 6, 6), noise(2, 16, seed=2), noise(2, 5, 24, seed=3))
QKV = ("to_q", "to_k", "to_v")
FP8_OPTIONS = {**OPTIONS, "precision": "fp8", "calibration_method": "mse"}


def transformer(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer().eval().requires_grad_(False)


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What each rewriting of a graph has changed."""
    made: list[dict[str, int]] = []
    run_passes = build.run_passes

    def spy(*args: Any) -> dict[str, int]:
        made.append(run_passes(*args))
        return made[-1]

    monkeypatch.setattr(build, "run_passes", spy)
    return made


@torch.no_grad()
def test_model_in_fp8_follows_a_change_of_one_merged_weight(
    inductor: EagerInductor,
    changes: list[dict[str, int]],
) -> None:
    model = transformer()
    step = compiled(model, precision="fp8")
    for _ in range(4):
        assert relative_error(step(*INPUTS), model(*INPUTS)) < CLOSE
    (made,) = changes
    assert {name: made[name] for name in ("merge_linears", "fuse_geglu", "fuse_channel_add")} == {
        "merge_linears": 5,
        "fuse_geglu": 1,
        "fuse_channel_add": 1,
    }
    for change in (2.0, 16.0, 1 / 32, torch.nan, 1.0):
        original = model.to_q.weight.clone()
        model.to_q.weight.mul_(change)
        result = step(*INPUTS)
        if change == change:
            assert relative_error(result, model(*INPUTS)) < CLOSE
        else:
            assert not result.isfinite().any()
            model.to_q.weight.copy_(original)
    assert (len(inductor.graphs), dynamo_graphs()) == (1, 1)
    assert oq.reports()[-1].phase == "quantized"


@torch.no_grad()
def test_lora_on_one_of_the_merged_layers_is_followed(inductor: EagerInductor) -> None:
    model = transformer()
    step = compiled(model, precision="fp8")
    for _ in range(3):
        before = step(*INPUTS)
    with unittest.mock.patch.object(Layer, "requantize", autospec=True, side_effect=Layer.requantize) as requantize:
        model.to_v.weight.add_(noise(16, 2, seed=7) @ noise(2, 16, seed=8))
        result = step(*INPUTS)
    assert requantize.call_count == 1
    expected = model(*INPUTS)
    assert relative_error(result, expected) < CLOSE < relative_error(before, expected) / 2
    assert (len(inductor.graphs), dynamo_graphs()) == (1, 1)


@torch.no_grad()
def test_blocks_of_one_graph_have_merged_weights_of_their_own(
    inductor: EagerInductor,
    changes: list[dict[str, int]],
) -> None:
    """Regional compilation: one graph, and every block brings weights of its own."""
    blocks = [copy.deepcopy(transformer(seed)) for seed in range(2)]
    for block in blocks:
        block.compile(backend=oq.onlinequant, options=dict(FP8_OPTIONS))
    for _ in range(4):
        for block in blocks:
            assert relative_error(block(*INPUTS), block.forward(*INPUTS)) < CLOSE
    assert (len(inductor.graphs), dynamo_graphs(), len(changes)) == (1, 1, 1)
    merged = [
        {id(known_layers.layer(getattr(block, name).weight, None, formats.FP8, "mse").copy.merged) for name in QKV}
        for block in blocks
    ]
    assert len(merged[0]) == len(merged[1]) == 1
    assert merged[0].isdisjoint(merged[1])
    blocks[1].to_q.weight.mul_(3)
    for block in blocks:
        assert relative_error(block(*INPUTS), block.forward(*INPUTS)) < CLOSE
    assert len(inductor.graphs) == 1


@pytest.mark.parametrize("format", [FP8, INT8])
def test_copies_made_to_be_merged_are_merged_where_they_are(format: Format) -> None:
    weights = [noise(rows, 16, seed=rows) for rows in (8, 24, 4, 12)]
    made = selected(weights, format, together=[(0, 2, 3)])
    before = [layer.weight for layer in made.layers]
    same = [weight.clone() for weight in weights]
    expected = merge(selected(same, format), (0, 2, 3))
    merged = merge(made, (0, 2, 3))
    assert torch.equal(merged.weight.float(), expected.weight.float())
    assert torch.equal(merged.weight_scale, expected.weight_scale)
    assert merged.weight.is_contiguous() and merged.weight.shape == (24, 16)
    for layer, weight in zip(made.layers, before, strict=True):
        assert layer.weight is not None and weight is not None
        assert layer.weight.data_ptr() == weight.data_ptr()
    assert storage(merged.weight) == storage(before[2]) != storage(before[1])
    same = [weight.clone() for weight in weights]
    two = merge(selected(same, format, together=[(0, 2, 3)]), (0, 2))
    assert_near(two, [weights[0], weights[2]])  # the third was refused, say


@pytest.mark.parametrize("shapes", [[(8, 16), (8, 32)], [(3, 7), (5, 7)], [(8, 16), (8, 16, 1, 1)]])
def test_what_cannot_be_one_weight_is_made_apart(shapes: list[tuple[int, ...]]) -> None:
    weights = [noise(*shape, seed=len(shape)) for shape in shapes]
    copies = [Copy(None, FP8) for _ in weights]
    make_room(copies, weights)
    rooms = [copy.room[0] for copy in copies if copy.room is not None]
    assert [tuple(room.shape) for room in rooms] == shapes
    assert storage(rooms[0]) != storage(rooms[1])


@pytest.mark.parametrize("format", SYMMETRIC)
def test_all_that_stays_of_quantizing_is_allocated_first(format: Format) -> None:
    """So much as a scale among what is freed again would keep a GPU's memory from being given back."""
    weights = [noise(8, 16), noise(4, 16), noise(8, 16, 3, 3)]
    geometries = [None, None, ConvGeometry((1, 1), (1, 1), (1, 1))]
    layers = [Layer(geometry, format, "minmax") for geometry in geometries]
    made = WeightSet(weights, list("abc"), range(3), layers, layout=0, together=[(0, 1)])
    with made.room(weights, range(3)):
        allocated = [addresses(layer._qparams, *(layer.copy.room or ())) for layer in layers]
        for layer, weight in zip(layers, weights, strict=True):
            layer.observe(noise(2, *weight.shape[1:]), weight)
            layer.requantize(weight)
    kept = [addresses(layer.qparams, layer.copy.weight, layer.copy.weight_scale) for layer in layers]
    assert kept == allocated


def addresses(*tensors: torch.Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
