from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.compilation import compiled_graph
from onlinequant_backend.errors import FreedWeightsError
from onlinequant_backend.graph import ConvGeometry
from onlinequant_backend.kernels.formats import FP8
from onlinequant_backend.quantization import weight_copy, weight_quantization
from onlinequant_backend.quantization.layer_registry import known_layers
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.quantization.weight_copy import Copy
from onlinequant_backend.quantization.weight_set import WeightSet
from onlinequant_backend.runtime.set_registry import known_sets
from tests.helpers.graph_probe import host_precision
from tests.helpers.tiny import noise, relative_error

FORMAT = host_precision().format
PADDED = ConvGeometry((1, 1), (1, 1), (1, 1))


def linears(count: int = 3, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(24, 24) for _ in range(count))).requires_grad_(False).to(dtype)


def set_of(
    weights: Sequence[torch.Tensor], layers: Sequence[Layer], candidates: Sequence[int] | None = None
) -> WeightSet:
    """A set whose parameters are called "0", "1", ..., each the weight of a layer unless ``candidates`` says which."""
    names = [str(position) for position in range(len(weights))]
    return WeightSet(weights, names, range(len(weights)) if candidates is None else candidates, layers, layout=0)


def named(weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(position): weight for position, weight in enumerate(weights)}


def selected(weights: Sequence[torch.Tensor], selection: Sequence[int] | None = None) -> WeightSet:
    """A set whose layers have seen an input and run in 8 bit."""
    layers = [known_layers.layer(weight, None, FORMAT, "minmax") for weight in weights]
    for layer in layers:
        layer.observed.update(noise(16, 24))
    made = set_of(weights, layers)
    made.select(weights, range(len(weights)) if selection is None else selection)
    return made


def weights_of(module: nn.Module) -> list[nn.Parameter]:
    return [value for value in module.parameters() if value.dim() > 1]


# --- WeightSet: the table of weight changes ---


def add_in_place(weight: nn.Parameter) -> None:
    weight.add_(0.25)


def copy_in_place(weight: nn.Parameter) -> None:
    weight.copy_(weight.flip(0))


def load_state_dict(weight: nn.Parameter) -> None:
    holder = nn.ParameterList([weight])
    assert holder[0] is weight
    holder.load_state_dict({"0": weight.detach() * 2})


def replace_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2


def add_to_data(weight: nn.Parameter) -> None:
    weight.data += 0.25


def copy_into_data(weight: nn.Parameter) -> None:
    weight.data.copy_(weight.data * 2)


VERSIONED = [add_in_place, copy_in_place, load_state_dict]
UNVERSIONED = [replace_data, add_to_data, copy_into_data]


def assert_followed(made: WeightSet, weights: Sequence[nn.Parameter], change: Callable[[nn.Parameter], None]) -> None:
    changed = weights[1]
    handles = [(layer.weight, layer.weight_scale) for layer in made.layers]
    before = changed.detach().clone()
    assert made.is_current(weights)
    change(changed)
    assert not torch.equal(changed, before)
    assert not made.is_current(weights)
    assert made.follow(weights) == 1
    assert made.is_current(weights)
    assert made.follow(weights) == 0
    assert all(
        layer.weight is q and layer.weight_scale is s for layer, (q, s) in zip(made.layers, handles, strict=True)
    )
    x = noise(16, 24)
    y = x @ changed.detach().float().t()
    assert relative_error(made.layers[1].quantized_output(x, None, y), y) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", VERSIONED + UNVERSIONED)
def test_change_of_a_weight_is_noticed(change: Callable[[nn.Parameter], None], dtype: torch.dtype) -> None:
    weights = weights_of(linears(dtype=dtype))
    assert_followed(selected(weights), weights, change)


@pytest.mark.parametrize("change", [*VERSIONED, add_to_data, copy_into_data])
def test_change_of_an_inference_tensor_is_noticed(change: Callable[[nn.Parameter], None]) -> None:
    """It counts no versions, so only its values tell."""
    with torch.inference_mode():
        weights = weights_of(linears())
        assert all(weight.is_inference() for weight in weights)
        made = selected(weights)
        assert_followed(made, weights, change)
    assert made.is_current(weights)


@torch.no_grad()
@pytest.mark.parametrize("change", VERSIONED + UNVERSIONED)
@pytest.mark.parametrize("layout", ["transposed", "slice"])
def test_change_of_a_strided_weight_is_noticed(change: Callable[[nn.Parameter], None], layout: str) -> None:
    values = [noise(24, 48, seed=seed) for seed in range(3)]
    strided = [value[:, :24] if layout == "slice" else value[:, :24].t() for value in values]
    weights = [nn.Parameter(value, requires_grad=False) for value in strided]
    assert not any(weight.is_contiguous() for weight in weights)
    assert_followed(selected(weights), weights, change)


@torch.no_grad()
def test_new_parameter_takes_over_the_layer_of_the_old() -> None:
    """ComfyUI's LoRA: another object in the same place, and back again."""
    weights = weights_of(linears())
    made = selected(weights)
    patched = [weights[0], nn.Parameter(weights[1] * 2, requires_grad=False), weights[2]]
    assert made.ids != [id(weight) for weight in patched]
    known_sets.add(made)
    assert known_sets.predecessor(named(patched)) is made
    assert known_sets.predecessor(named(weights_of(linears()))) is None
    assert known_sets.predecessor({f"other.{name}": weight for name, weight in named(weights).items()}) is None
    assert (made.overlap(named(weights)), made.overlap(named(patched))) == (3, 2)

    old = made.layer("1")
    assert old is made.layers[1]
    assert known_layers.layer(patched[1], None, FORMAT, "minmax", old=old) is old
    assert known_layers.layer(patched[1], None, FORMAT, "mse", old=old) is not old
    assert known_layers.layer(patched[1], None, FP8, "minmax", old=old) is not old
    following = set_of(patched, made.layers)
    handle = old.weight
    following.select(patched, range(3))
    assert (following.is_current(patched), old.weight is handle) == (True, True)
    assert not made.is_current(weights)
    assert made.follow(weights) == 1
    assert made.is_current(weights)


@torch.no_grad()
def test_weights_of_float_layers_are_not_watched() -> None:
    weights = weights_of(linears())
    made = selected(weights, [0, 2])
    weights[1].add_(1)
    assert made.is_current(weights)
    assert (made.layers[1].weight, made.selection) == (None, (0, 2))


@torch.no_grad()
def test_a_weight_that_another_place_needs_in_float_is_not_freed() -> None:
    weights = weights_of(linears(2))
    layers = [known_layers.layer(weights[0], None, FORMAT, "minmax", place=place) for place in range(2)]
    layers.append(known_layers.layer(weights[1], None, FORMAT, "minmax"))
    for layer in layers:
        layer.observed.update(noise(16, 24))
    made = set_of(weights, layers, [0, 0, 1])
    made.select(weights, [0, 2])
    made.free(weights)
    assert [layer.copy.freed for layer in layers] == [False, False, True]
    assert [bool(weight.isnan().any()) for weight in weights] == [False, True]
    made.check_not_freed(weights[:1])
    with pytest.raises(FreedWeightsError):
        made.check_not_freed(weights)


@torch.no_grad()
def test_same_values_elsewhere_are_not_quantized_again_in_vain() -> None:
    """Offloading moves weights to and fro: that must be seen, since nothing tells it from a change."""
    weights = weights_of(linears())
    made = selected(weights)
    weights[1].data = weights[1].data.clone()
    assert not made.is_current(weights)
    assert made.follow(weights) == 1
    assert made.is_current(weights)


def test_calls_are_those_of_the_layer_that_saw_least() -> None:
    weights = weights_of(linears())
    layers = [known_layers.layer(weight, None, FORMAT, "minmax") for weight in weights]
    first, second = set_of(weights[:2], layers[:2]), set_of(weights[1:], layers[1:])
    first.count_call("")
    first.count_call("")
    second.count_call("")
    assert [layer.calls for layer in layers] == [2, 3, 1]
    assert (first.calls(), second.calls()) == (2, 1)


def test_layer_that_is_called_twice_counts_once() -> None:
    (weight,) = weights_of(linears(1))
    layer = known_layers.layer(weight, None, FORMAT, "minmax")
    made = set_of([weight], [layer, layer], [0, 0])
    made.count_call("")
    assert made.calls() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_any_float_dtype(dtype: torch.dtype) -> None:
    """ComfyUI keeps float8 weights and casts them in the graph."""
    weight = nn.Parameter(noise(24, 24).to(dtype), requires_grad=False)
    made = selected([weight])
    assert made.is_current([weight])
    weight.data = noise(24, 24, seed=5).to(dtype)
    assert not made.is_current([weight])
    assert made.follow([weight]) == 1
    assert made.is_current([weight])


# --- Registry ---


@torch.no_grad()
def test_sets_that_share_a_weight_share_its_layer() -> None:
    weights = weights_of(linears(4))
    first, second = selected(weights[:3]), selected(weights[1:])
    assert first.layers[1:] == second.layers[:2]
    # What the first set quantizes again, the second need not, but must have noticed.
    weights[1].add_(1)
    assert not second.is_current(weights[1:])
    assert first.follow(weights[:3]) == 1
    assert not second.is_current(weights[1:])
    assert second.follow(weights[1:]) == 0
    assert second.is_current(weights[1:])
    assert first.is_current(weights[:3])


def test_layer_depends_on_what_its_state_depends_on() -> None:
    weight, other = nn.Parameter(noise(8, 8)), nn.Parameter(noise(8, 8))
    layer = known_layers.layer(weight, None, 7, "mse")
    assert known_layers.layer(weight, None, 7, "mse") is layer
    assert known_layers.layer(other, None, 7, "mse") is not layer  # equal values, another tensor
    assert known_layers.layer(weight, PADDED, 7, "mse") is not layer
    assert known_layers.layer(weight, None, 8, "mse") is not layer
    assert known_layers.layer(weight, None, 7, "minmax") is not layer
    # An old layer is for weights that have none.
    assert known_layers.layer(weight, None, 7, "mse", old=Layer(None, 7, "mse")) is layer
    known_layers.clear()
    assert known_layers.layer(weight, None, 7, "mse") is not layer


def test_dropped_model_takes_its_layers_along() -> None:
    module = linears()
    made = selected(weights_of(module))
    layers = [weakref.ref(layer) for layer in made.layers]
    handles = [weakref.ref(layer.weight) for layer in made.layers if layer.weight is not None]
    assert made.alive
    assert not made.is_dead()
    del module[1]
    gc.collect()
    assert (made.alive, made.is_dead()) == (False, False)
    del module
    gc.collect()
    assert made.is_dead()
    assert len(handles) == 3
    del made
    gc.collect()
    assert [layer() for layer in layers] == [handle() for handle in handles] == [None] * 3


@torch.no_grad()
def test_invalidate_is_for_changes_that_leave_no_trace() -> None:
    module = linears()
    weights = weights_of(module)
    made = selected(weights)
    weights[2].data[0, 0] += 1
    assert made.is_current(weights)
    assert oq.invalidate(module[2]) == 1
    assert not made.is_current(weights)
    assert made.follow(weights) == 1
    assert made.is_current(weights)
    assert oq.invalidate(module) == 3
    assert made.follow(weights) == 3
    assert oq.invalidate(linears()) == 0


def test_released_weights_take_the_captures_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    released = []

    class Graphed:
        def __init__(self, function: Callable[..., torch.Tensor]) -> None:
            self.function = function

        def __call__(self, *args: torch.Tensor) -> torch.Tensor:
            return self.function(*args)

        def release(self) -> None:
            released.append(self)

    monkeypatch.setattr(compiled_graph, "GraphedCall", Graphed)
    module, other = linears(), linears()
    known, others = selected(weights_of(module)), selected(weights_of(other))
    known_sets.add(known)
    known_sets.add(others)
    graph = compiled_graph.CompiledGraph(lambda weight: weight, [], [("weight", 1)], graphed=Graphed)
    prepared, kept = graph.prepare(known), graph.prepare(others)
    assert graph([], known) is known.layers[1].weight is not None
    oq.release(module)
    assert released == [prepared.function, prepared.counting.run]
    assert graph.prepare(known) is not prepared and graph.prepare(others) is kept


def test_what_was_merged_is_released_as_a_whole_and_merged_again() -> None:
    module = linears()
    known = selected(weights_of(module))
    known_sets.add(known)
    for layer in known.layers:  # as on a GPU: on a CPU weights are packed and never merged
        layer.format = layer.copy.format = FP8
    oq.invalidate(module)
    for layer in known.layers:
        layer.copy.weight = layer.copy.weight_scale = None
    known.follow(weights_of(module))
    x = noise(4, 24)
    merged = known.extra("merged_weight", (0, 1))
    before = [layer.quantized_output(x, None, x) for layer in known.layers]
    guard = weakref.ref(merged)
    del merged
    size = oq.copied_bytes(module)
    assert oq.release(module) == size == 3 * 24 * 24
    gc.collect()
    assert guard() is None
    assert known.extra("merged_weight", (0, 1)).shape == (48, 24)
    known.follow(weights_of(module))
    for layer, expected in zip(known.layers, before, strict=True):
        assert torch.equal(layer.quantized_output(x, None, x), expected)


# --- Memory ---


def test_copies_are_allocated_before_what_is_needed_to_make_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a GPU's memory has holes between the copies, which are never given back."""
    weights = [noise(24, 24, seed=1), noise(32, 24, seed=2), noise(8, 16, 3, 3, seed=3)]
    layers = [known_layers.layer(weight, PADDED if weight.dim() == 4 else None, FP8, "minmax") for weight in weights]
    done: list[str] = []
    quantize, allocate = weight_quantization.quantize_weight, Copy.new_tensor

    def quantized(*args: Any) -> Any:
        done.append("quantized")
        return quantize(*args)

    def allocated(self: Copy, weight: torch.Tensor) -> torch.Tensor:
        done.append("allocated")
        return allocate(self, weight)

    monkeypatch.setattr(weight_copy, "quantize_weight", quantized)
    monkeypatch.setattr(Copy, "new_tensor", allocated)
    assert set_of(weights, layers).quantize(weights, range(3)) == 3
    assert done == ["allocated"] * 3 + ["quantized"] * 3
    for layer, weight in zip(layers, weights, strict=True):
        assert layer.weight is not None and layer.weight_scale is not None
        assert torch.equal(layer.weight.float(), quantize(weight, FP8)[0].float())
    assert layers[2].weight.is_contiguous(memory_format=torch.channels_last)
