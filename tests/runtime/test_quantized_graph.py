"""The two-phase callable. Inductor is replaced by running the rewritten graph as it is, which is quick and counts."""

from __future__ import annotations

import copy
import gc
import math
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import onlinequant_backend as oq
from onlinequant_backend.kernels import x86 as kernels_cpu
from onlinequant_backend.quantization import merged_weight, weight_copy
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.runtime.set_registry import known_sets
from tests.helpers.eager_inductor import EagerInductor, dynamo_graphs
from tests.helpers.reports import layers
from tests.helpers.small import CLOSE, X, compiled
from tests.helpers.tiny import OPTIONS, Net, deltas, net, noise, relative_error


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    torch._dynamo.utils.counters.clear()


@torch.no_grad()
def test_observed_calls_are_exact_then_one_compile_then_8_bit(inductor: EagerInductor) -> None:
    model = net()
    step, expected = compiled(model), model(X)
    for call in (1, 2):
        assert torch.equal(step(X), expected)
        assert oq.reports()[-1].phase == "calibrating"
        assert oq.reports()[-1].calls_observed == call
        assert not inductor.graphs
    for _ in range(3):
        assert 0 < relative_error(step(X), expected) < CLOSE
    report = oq.reports()[-1]
    assert (report.model, report.phase, len(inductor.graphs), dynamo_graphs()) == ("Net", "quantized", 1, 1)
    assert report.stats_path is not None
    saved = oq.Report.load(report.stats_path)
    assert (saved.phase, saved.decisions) == ("quantized", report.decisions)
    assert all(decision.quantized and decision.reason for decision in layers(report))
    assert {decision.name for decision in layers(report)} == {
        name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() > 1
    }
    assert all(decision.sensitivity is not None and decision.sensitivity > 0 for decision in layers(report))
    assert inductor.quantized_ops() == len(layers(report)) == 7


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 1.9])
def test_fp8_has_room_for_activations_that_grow(factor: float, inductor: EagerInductor) -> None:
    """A LoRA makes them larger than what was observed: an 8-bit integer would clip them."""
    errors = {}
    for precision in ("fp8", "int8"):
        model = net()
        step = compiled(model, precision=precision, calibration_method="minmax", drift_check_every=0)
        for _ in range(3):
            step(X)
        errors[precision] = relative_error(step(X * factor), model(X * factor))
    assert errors["fp8"] < CLOSE
    assert (errors["int8"] < CLOSE) == (factor == 1)


@torch.no_grad()
def test_fifty_steps_neither_recompile_nor_break(inductor: EagerInductor) -> None:
    step = compiled(net())
    for seed in range(50):
        step(noise(1, 4, 8, 8, seed=seed))
    assert (len(inductor.graphs), dynamo_graphs()) == (1, 1)
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_float_weights_are_no_inputs_of_the_8_bit_graph(inductor: EagerInductor) -> None:
    step = compiled(net())
    for _ in range(3):
        step(X)
    inputs = [node.name for node in inductor.graphs[-1].graph.find_nodes(op="placeholder")]
    assert not [name for name in inputs if "to_q" in name or ("conv" in name and "weight" in name and "l_self" in name)]
    # q, k and v share one set of parameters for the tensor that they read.
    assert sum("qparams" in name for name in inputs) == 7 - 2


SIZES = ((1, 8, 8), (2, 8, 8), (1, 12, 8), (3, 16, 12), (1, 8, 16), (4, 8, 8), (2, 12, 12), (1, 20, 4))


@torch.no_grad()
@pytest.mark.parametrize(("mode", "dynamo", "compiles"), [("auto", 2, 3), ("static", 8, 8), ("dynamic", 1, 1)])
def test_any_sizes(mode: str, dynamo: int, compiles: int, inductor: EagerInductor) -> None:
    """Batch, height and width in any order, a batch of one among them; nothing is ever calibrated twice.

    Dynamo's second graph is the first that is called in 8 bit here. So it is compiled for one size and then for all,
    and its first one when that size comes again.
    """
    model = net()
    step = compiled(model, shapes=mode)
    inputs = [noise(batch, 4, *size) for batch, *size in SIZES]
    for x in inputs + inputs[::-1]:
        assert relative_error(step(x), model(x)) < CLOSE
    assert (dynamo_graphs(), len(inductor.graphs)) == (dynamo, compiles)
    assert max(report.calls_observed for report in oq.reports()) == 2
    assert oq.reports()[-1].phase == "quantized"


@torch.no_grad()
def test_any_sizes_of_a_function(inductor: EagerInductor) -> None:
    """Sizes of inputs are symbolic, those of weights, wherever the module is, never are."""
    model = net()
    step = torch.compile(lambda x, unet: unet(x), backend=oq.onlinequant, options=OPTIONS)
    around = torch.compile(lambda x: model(x), backend=oq.onlinequant, options=OPTIONS)
    for batch, *size in SIZES:
        x = noise(batch, 4, *size)
        for result in (step(x, model), step(x, model), around(x), around(x)):
            assert relative_error(result, model(x)) < CLOSE
    assert (dynamo_graphs(), len(inductor.graphs)) == (4, 3)  # one model, so one first size


@torch.no_grad()
def test_a_float_that_has_to_be_a_number_is_not_compiled_for_without_end(inductor: EagerInductor) -> None:
    model = net()
    function = lambda x, number: model(x) + torch.full_like(x, number)  # noqa: E731
    step = torch.compile(function, backend=oq.onlinequant, options=OPTIONS)
    for call in range(20):
        assert relative_error(step(X, call / 20), function(X, call / 20)) < CLOSE
    assert len(inductor.graphs) < 10


@torch.no_grad()
def test_going_back_to_the_first_size_compiles_nothing(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model)
    for batch in (1, 1, 1, 2, 1, 2, 1):
        x = noise(batch, 4, 8, 8)
        assert relative_error(step(x), model(x)) < CLOSE
    assert (dynamo_graphs(), len(inductor.graphs)) == (2, 2)


@torch.no_grad()
def test_a_model_compiled_as_dynamic_has_its_first_size_specialised(inductor: EagerInductor) -> None:
    model = net()
    step = torch.compile(model, backend=oq.onlinequant, options=OPTIONS, dynamic=True)
    for size in (8, 8, 8, 12, 16, 8):
        x = noise(2, 4, size, size)
        assert relative_error(step(x), model(x)) < CLOSE
    assert (dynamo_graphs(), len(inductor.graphs)) == (1, 2)
    assert [sum(isinstance(x, torch.SymInt) for x in inputs) for inputs in inductor.inputs] == [0, 2]


@torch.no_grad()
def test_a_model_compiled_as_static_stays_so(inductor: EagerInductor) -> None:
    model = net()
    step = torch.compile(model, backend=oq.onlinequant, options=OPTIONS, dynamic=False)
    for size in (8, 8, 8, 12, 16, 8):
        x = noise(2, 4, size, size)
        assert relative_error(step(x), model(x)) < CLOSE
    assert (dynamo_graphs(), len(inductor.graphs)) == (3, 3)


@torch.no_grad()
def test_other_models_are_traced_as_ever() -> None:
    """What we tell Dynamo for our frames must not leak into those of others."""
    traced: list[torch.fx.GraphModule] = []
    other = torch.compile(nn.ReLU(), backend=lambda module, _: traced.append(module) or module)
    step = compiled(net(), shapes="dynamic", calibration_steps=100)
    for size in (8, 12, 16):
        step(noise(1, 4, size, size))
        other(noise(1, size))
    inputs = [[node.target for node in module.graph.find_nodes(op="placeholder")] for module in traced]
    assert [len(names) for names in inputs] == [1, 2]
    assert torch._dynamo.config.assume_static_by_default
    assert torch.fx.experimental._config.use_duck_shape
    assert torch.backends.mkldnn.enabled


def test_no_grad_and_inference_mode_share_one_calibration(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model)
    with torch.no_grad():
        expected = model(X)
        for _ in range(3):
            step(X)
    with torch.inference_mode():
        assert 0 < relative_error(step(X.clone()), expected) < CLOSE
    assert [report.phase for report in oq.reports()] == ["quantized", "quantized"]
    assert oq.reports()[1].calls_observed == 0


@torch.no_grad()
def test_several_graphs(inductor: EagerInductor) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = net(), net(seed=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = Broken()
    step = compiled(model)
    for _ in range(4):
        assert relative_error(step(X), model(X)) < CLOSE
    assert [report.phase for report in oq.reports()] == ["quantized", "quantized"]


@torch.no_grad()
def test_one_graph_serves_many_blocks(inductor: EagerInductor) -> None:
    """Regional compilation: Dynamo makes one graph, and every block brings weights of its own."""
    torch.manual_seed(0)
    blocks = [copy.deepcopy(net()) for _ in range(3)]
    for block in blocks:
        for parameter in block.parameters():
            parameter.mul_(1 + torch.rand(()))
        block.compile(backend=oq.onlinequant, options=dict(OPTIONS))
    for _ in range(4):
        for block in blocks:
            assert relative_error(block(X), block.forward(X)) < CLOSE
    assert dynamo_graphs() == 1
    assert len(inductor.graphs) == 1


class Optioned(nn.Module):
    """As ComfyUI's UNet: it looks into a dict that other nodes put something into."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, options: dict[str, float]) -> torch.Tensor:
        for _ in options:  # so that Dynamo minds how many there are
            pass
        return self.net(x) * options.get("scale", 1.0)


@torch.no_grad()
def test_a_graph_that_is_traced_again_is_not_compiled_again(inductor: EagerInductor) -> None:
    model = Optioned()
    step = compiled(model)
    for others in range(4):
        options = {str(other): 1.0 for other in range(others)}
        for _ in range(3):
            result = step(X, options)
        assert relative_error(result, model(X, options)) < CLOSE
    # The first is for its own sizes, the second for all sizes.
    assert (dynamo_graphs(), len(inductor.graphs), len(oq.reports())) == (4, 2, 2)
    for _ in range(3):
        result = step(X, {"scale": -2.0})
    assert relative_error(result, model(X, {"scale": -2.0})) < CLOSE
    assert len(inductor.graphs) == 3


@torch.no_grad()
def test_a_graph_with_a_constant_of_its_own_is_compiled_by_itself(inductor: EagerInductor) -> None:
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.net, self.value = net(), value

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) * torch.tensor([self.value])

    for value in (1.0, -1.0):
        model = Constant(value)
        step = compiled(model)
        for _ in range(3):
            result = step(X)
        assert relative_error(result, model(X)) < CLOSE


def add_in_place(weight: nn.Parameter, delta: torch.Tensor) -> None:
    weight.add_(delta)


def copy_in_place(weight: nn.Parameter, delta: torch.Tensor) -> None:
    weight.copy_(weight + delta)


def new_data(weight: nn.Parameter, delta: torch.Tensor) -> None:
    weight.data = weight.data + delta


def add_to_data(weight: nn.Parameter, delta: torch.Tensor) -> None:
    weight.data += delta


def copy_into_data(weight: nn.Parameter, delta: torch.Tensor) -> None:
    weight.data.copy_(weight.data + delta)


CHANGES = (add_in_place, copy_in_place, new_data, add_to_data, copy_into_data)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_changed_weights_are_followed(
    precision: str, change: Callable[..., None], inference: bool, inductor: EagerInductor
) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        model = net()
        step = compiled(model, precision=precision)
        for _ in range(3):
            step(X)
        before = model(X)
        for layer, delta in deltas(model):
            change(layer.weight, delta)
        expected = model(X)
        assert relative_error(expected, before) > 3 * CLOSE
        for _ in range(2):
            assert relative_error(step(X), expected) < CLOSE
        assert (len(inductor.graphs), dynamo_graphs()) == (1, 1)


@pytest.mark.parametrize("inference", [False, True])
def test_replaced_parameters_are_followed_there_and_back(inference: bool, inductor: EagerInductor) -> None:
    """A ComfyUI LoRA: new Parameter objects, later the old ones again."""
    with torch.inference_mode(inference), torch.no_grad():
        model = net()
        step = compiled(model)
        for _ in range(3):
            step(X)
        plain = model(X)
        originals = {}
        for layer, delta in deltas(model):
            originals[layer] = layer.weight
            layer.weight = nn.Parameter(layer.weight + delta, requires_grad=False)
        assert relative_error(step(X), model(X)) < CLOSE
        assert relative_error(model(X), plain) > 3 * CLOSE
        for layer, weight in originals.items():
            layer.weight = weight
        assert relative_error(step(X), plain) < CLOSE
        assert (len(inductor.graphs), dynamo_graphs()) == (1, 1)
        assert oq.reports()[-1].calls_observed == 2


@torch.no_grad()
def test_two_graphs_that_share_weights_never_serve_each_others(inductor: EagerInductor) -> None:
    """Two shapes are two graphs over one 8-bit copy; the copy follows whichever weights are in the model now."""
    model = net()
    step = compiled(model)
    wide = noise(2, 4, 8, 8)
    original = model.blocks[0].conv.weight
    changed = nn.Parameter(original * -1.5, requires_grad=False)
    for _ in range(3):
        step(X), step(wide)
    for weight in (changed, original, changed, original):
        model.blocks[0].conv.weight = weight
        for x in (wide, X):
            assert relative_error(step(x), model(x)) < CLOSE


@torch.no_grad()
def test_replaced_weights_in_another_layout(inductor: EagerInductor) -> None:
    """A float weight that comes back in another memory format is another graph, not a wrong stride."""
    model = net()
    step = compiled(model, exclude=("conv_in",))
    for _ in range(3):
        step(X)
    weight = model.conv_in.weight.to(memory_format=torch.channels_last).clone(memory_format=torch.preserve_format)
    model.conv_in.weight = nn.Parameter(weight, requires_grad=False)
    assert relative_error(step(X), model(X)) < CLOSE
    assert len(inductor.graphs) == 2


@torch.no_grad()
def test_another_models_weights_are_calibrated_anew(inductor: EagerInductor) -> None:
    """``load_state_dict(assign=True)`` with another checkpoint replaces every parameter."""
    model, other = net(), net(seed=5)
    step = compiled(model)
    for _ in range(3):
        step(X)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(step(X), other(X))
    step(X)
    assert 0 < relative_error(step(X), other(X)) < CLOSE
    assert (len(inductor.graphs), dynamo_graphs()) == (1, 1)


@torch.no_grad()
def test_another_checkpoint_loaded_in_place_is_calibrated_anew(inductor: EagerInductor) -> None:
    """Every value has changed, so the ranges may have; two graphs of the model must both notice."""
    model, other = net(), net(seed=5)
    for block in other.blocks:
        block.norm.weight.mul_(8)
    step = compiled(model)
    wide = noise(2, 4, 8, 8)
    for _ in range(3):
        step(X), step(wide)
    model.load_state_dict(other.state_dict())
    for _ in range(2):
        assert torch.equal(step(X), other(X))
    for _ in range(3):
        errors = [relative_error(step(x), other(x)) for x in (X, wide)]
        assert all(error < CLOSE for error in errors)  # the first ones may be done again in float
    assert all(errors)
    assert (len(inductor.graphs), dynamo_graphs()) == (2, 2)


@torch.no_grad()
def test_another_checkpoint_after_the_last_observed_call_is_calibrated(inductor: EagerInductor) -> None:
    """Not taken for a LoRA, which would leave biases and norms as they are."""
    model, other = net(), net(seed=5)
    for block in other.blocks:
        block.norm.weight.mul_(8)
    step = compiled(model)
    for _ in range(2):
        step(X)
    model.load_state_dict(other.state_dict())
    for _ in range(2):
        assert torch.equal(step(X), other(X))
    for _ in range(2):
        assert 0 < relative_error(step(X), other(X)) < CLOSE


@torch.no_grad()
def test_nothing_is_left_of_a_model_that_is_gone(inductor: EagerInductor) -> None:
    """Dynamo keeps its graph for the next one of its class, which may never come."""
    model = net()
    step = compiled(model)
    for _ in range(3):
        step(X)
    memory = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
    (weights,) = known_sets
    memory += [StorageWeakRef(layer.weight.untyped_storage()) for layer in weights.layers if layer.weight is not None]
    assert len(memory) > len(list(model.parameters())) and not any(part.expired() for part in memory)
    del model, step
    gc.collect()
    assert all(part.expired() for part in memory)
    model = net()
    step = compiled(model)  # runs in the graph of the one before
    for _ in range(3):
        expected, result = model(X), step(X)
    assert 0 < relative_error(result, expected) < CLOSE and dynamo_graphs() == 1


@torch.no_grad()
def test_nothing_is_left_of_a_model_that_is_gone_while_it_is_observed_again(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model)
    for _ in range(3):
        step(X)
    model.load_state_dict(net(seed=5).state_dict())
    step(X)
    memory = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
    del model, step
    gc.collect()
    assert all(part.expired() for part in memory)


@torch.no_grad()
def test_models_that_are_soon_gone_leave_others_of_their_class_in_8_bit(inductor: EagerInductor) -> None:
    """They are not what sequential offload does, which replaces the weights of one model."""
    model = net(seed=99)
    step, expected = compiled(model), model(X)
    for seed in range(10):
        other = net(seed=seed)
        compiled(other)(X)
        del other
        gc.collect()
        for _ in range(3):
            result = step(X)
    assert 0 < relative_error(result, expected) < CLOSE and oq.reports()[-1].phase == "quantized"


@torch.no_grad()
def test_moved_weights_are_not_calibrated_anew(inductor: EagerInductor) -> None:
    """Offloading gives every parameter new memory with the same values."""
    model = net()
    step = compiled(model)
    for _ in range(3):
        step(X)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert 0 < relative_error(step(X), model(X)) < CLOSE


class Interrupting:
    """Has ``name`` raise KeyboardInterrupt after its second call: half of what is to be written is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, of: Any, name: str) -> None:
        self._left = 2
        self._function = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *args, **kwargs: self(*args, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        result = self._function(*args, **kwargs)
        if self._left == 0:
            raise KeyboardInterrupt
        return result


@torch.no_grad()
@pytest.mark.parametrize(
    ("precision", "where"),
    [
        ("int8", (weight_copy.Copy, "_write")),
        ("fp8", (weight_copy.Copy, "_write")),
        ("fp8", (weight_copy, "quantize_weight")),
        ("fp8", (merged_weight, "_rescale")),
    ],
)
def test_a_change_that_is_undone_after_an_interrupt_is_undone(
    precision: str, where: tuple[Any, str], inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while weights are quantized, when the copies are what neither the old nor the new weights give."""
    model = net()
    step = compiled(model, precision=precision)
    pictures = [step(X) for _ in range(4)]
    block = model.blocks[0]
    weights = [block.conv.weight, block.to_q.weight, block.to_k.weight, block.to_v.weight]
    originals = [weight.clone() for weight in weights]
    with monkeypatch.context() as patched:
        Interrupting(patched, *where)
        for weight in weights:
            weight.data.mul_(64)
        with pytest.raises(KeyboardInterrupt):
            step(X)
    for weight, original in zip(weights, originals, strict=True):
        weight.data.copy_(original)
    assert torch.equal(step(X), pictures[-1])
    assert len(inductor.graphs) == 1


@torch.no_grad()
def test_another_checkpoint_is_calibrated_although_it_was_interrupted(
    inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = net(), net(seed=5)
    step = compiled(model)
    for _ in range(3):
        step(X)
    model.load_state_dict(other.state_dict())
    with monkeypatch.context() as patched:
        Interrupting(patched, weight_copy.Copy, "_write")
        with pytest.raises(KeyboardInterrupt):
            step(X)
    for _ in range(2):
        assert torch.equal(step(X), other(X))
    step(X)  # may be done again in float
    assert 0 < relative_error(step(X), other(X)) < CLOSE


@torch.no_grad()
def test_invalidate_follows_a_change_that_leaves_no_trace(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model)
    for _ in range(3):
        step(X)
    model.conv_out.weight.data[0, 0] += 5  # one value, unseen by the samples
    expected = model(X)
    oq.invalidate(model)
    assert relative_error(step(X), expected) < CLOSE


@torch.no_grad()
def test_what_was_released_comes_back_without_a_compile(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model)
    pictures = [step(X) for _ in range(3)]
    layers = {layer for known in known_sets for layer in known.layers}
    copies = [weakref.ref(copy) for layer in layers for copy in (layer.weight, layer.weight_scale)]
    packed = len(kernels_cpu._packed_weights)
    size = oq.copied_bytes(model)
    assert size == sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)
    assert oq.release(model) == size and oq.copied_bytes(model) == 0
    assert not any(copy() is not None for copy in copies)
    assert len(kernels_cpu._packed_weights) == packed - len(layers)
    assert torch.equal(step(X), pictures[-1])
    assert (len(inductor.graphs), dynamo_graphs(), oq.copied_bytes(model)) == (1, 1, size)


@torch.no_grad()
def test_weights_that_change_after_a_release_are_followed(inductor: EagerInductor) -> None:
    """ComfyUI takes a LoRA off a model that it unloads, and may put another one on."""
    model = net()
    originals = dict(model.named_parameters())
    put(model, {name: w * 1.5 for name, w in originals.items() if "to_q" in name or "conv_out.weight" in name})
    step = compiled(model)
    for _ in range(3):
        step(X)
    put(model, originals)
    assert oq.release(model) > 0
    for factor in (1.0, 2.0):
        put(model, {"conv_out.weight": originals["conv_out.weight"] * factor})
        assert 0 < relative_error(step(X), model(X)) < CLOSE
    assert (len(inductor.graphs), dynamo_graphs()) == (1, 1)


def put(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """As ComfyUI does: each weight is replaced by another parameter."""
    for name, weight in weights.items():
        module, _, attribute = name.rpartition(".")
        parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        setattr(model.get_submodule(module), attribute, parameter)


@torch.no_grad()
def test_freed_weights_keep_their_copies(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model, free_float_weights=True)
    pictures = [step(X) for _ in range(3)]
    size = oq.copied_bytes(model)
    assert oq.release(model) == 0 and oq.copied_bytes(model) == size > 0
    assert torch.equal(step(X), pictures[-1])


@torch.no_grad()
def test_a_dropped_model_is_freed(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model)
    for _ in range(3):
        step(X)
    guard = weakref.ref(model.conv_in.weight)
    del model, step
    gc.collect()
    assert guard() is None


@torch.no_grad()
@pytest.mark.parametrize(("conv", "linear", "expected"), [(0, 100, 4), (100, 0, 3), (50, 25, 3), (0, 0, 0)])
def test_percentages(conv: float, linear: float, expected: int, inductor: EagerInductor) -> None:
    step = compiled(net(), quantized_conv_percentage=conv, quantized_linear_percentage=linear)
    for _ in range(3):
        step(X)
    decisions = oq.reports()[-1].decisions
    assert sum(decision.quantized for decision in decisions) == expected
    for kind in ("conv", "linear"):
        kept = [d.sensitivity for d in decisions if d.kind == kind and d.quantized and d.sensitivity is not None]
        refused = [d.sensitivity for d in decisions if d.kind == kind and not d.quantized and d.sensitivity is not None]
        assert not kept or not refused or max(kept) <= min(refused)
    assert oq.reports()[-1].phase == ("quantized" if expected else "float")


@torch.no_grad()
def test_end_to_end_sensitivity_is_the_models_error_with_one_layer_in_8_bit(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model, sensitivity="end_to_end")
    for _ in range(3):
        step(X)
    by_name = {decision.name: decision for decision in oq.reports()[-1].decisions}
    target = by_name["blocks.0.conv"]
    torch._dynamo.reset()
    alone = compiled(model, exclude=tuple(name for name in by_name if name != target.name))
    for _ in range(3):
        result = alone(X)
    mae = float((result - model(X)).abs().mean())
    assert target.mae == pytest.approx(mae, rel=1e-3)
    assert target.sensitivity == pytest.approx(mae / float(model(X).abs().mean()), rel=1e-3)


@torch.no_grad()
def test_a_graph_that_writes_its_input_keeps_local_sensitivities(inductor: EagerInductor) -> None:
    class Counting(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps.add_(1)
            return super().forward(x) + self.steps

    model = Counting().requires_grad_(False)
    model.register_buffer("steps", torch.zeros(()))
    step = compiled(model, sensitivity="end_to_end")
    for call in range(1, 5):
        step(X)
        assert model.steps == call
    assert oq.reports()[-1].phase == "quantized"


@torch.no_grad()
def test_layers_with_non_finite_inputs_stay_float(inductor: EagerInductor) -> None:
    class Exploding(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nan_to_num(self.conv_out(self.conv_in(x) / 0.0)) + super().forward(x)

    step = compiled(Exploding().requires_grad_(False))
    for _ in range(3):
        step(X)
    refused = [decision for decision in layers(oq.reports()[-1]) if not decision.quantized]
    assert [decision.name for decision in refused] == ["conv_out", "conv_out"]  # one weight, read twice
    assert all("finite" in decision.reason for decision in refused)


@torch.no_grad()
def test_a_failing_compile_leaves_the_float_model(inductor: EagerInductor, caplog: pytest.LogCaptureFixture) -> None:
    inductor.error = RuntimeError("no compiler")
    model = net()
    step = compiled(model)
    for _ in range(4):
        assert torch.equal(step(X), model(X))
    report = oq.reports()[-1]
    assert report.phase == "float"
    assert "no compiler" in report.phase_reason
    assert sum("continues in float" in record.message for record in caplog.records) == 1


@torch.no_grad()
@pytest.mark.parametrize("step_that_fails", ["select", "follow"])
def test_failing_to_quantize_leaves_the_float_model(
    step_that_fails: str, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no memory for 8-bit weights")

    model = net()
    step = compiled(model)
    monkeypatch.setattr(f"onlinequant_backend.quantization.weight_set.WeightSet.{step_that_fails}", fail)
    for _ in range(3):
        step(X)
    model.conv_in.weight.mul_(2)
    for _ in range(2):
        assert torch.equal(step(X), model(X))
    assert oq.reports()[-1].phase == "float"
    assert "no memory" in oq.reports()[-1].phase_reason


@torch.no_grad()
def test_a_percentage_too_small_for_any_layer_is_float(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model, quantized_conv_percentage=1, quantized_linear_percentage=1)
    for _ in range(4):
        assert relative_error(step(X), model(X)) < 1e-5
    report = oq.reports()[-1]
    assert (report.phase, report.counts()["quantized_conv"]) == ("float", 0)
    assert "no layer was selected" in report.phase_reason


def test_training_stays_float_with_right_gradients() -> None:
    model = net().requires_grad_(True)
    reference = copy.deepcopy(model)
    step = torch.compile(model, backend=oq.onlinequant, options=dict(OPTIONS))
    for _ in range(4):
        step(X).square().sum().backward()
        reference(X).square().sum().backward()
    for mine, its in zip(model.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and its.grad is not None
        assert relative_error(mine.grad, its.grad) < 1e-4
    assert oq.reports()[-1].phase == "float"
    assert "no_grad" in oq.reports()[-1].phase_reason


def test_parameters_that_need_gradients_later_get_them(inductor: EagerInductor) -> None:
    """Dynamo does not guard ``requires_grad`` of a parameter."""
    model = net()
    step = compiled(model)
    for _ in range(3):
        step(X)
    model.requires_grad_(True)
    step(X).sum().backward()
    mine = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    model(X).sum().backward()
    assert len(mine) == len(list(model.parameters()))
    for gradient, parameter in zip(mine, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(gradient, parameter.grad)
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(step(X), model(X)) < CLOSE


@torch.no_grad()
def test_a_new_compile_reuses_the_calibration(inductor: EagerInductor) -> None:
    model = net()
    for expected_calls in (2, 0):
        torch._dynamo.reset()
        gc.collect()  # the first graph as well
        step = compiled(model)
        for _ in range(3):
            step(X)
        assert oq.reports()[-1].phase == "quantized"
        assert oq.reports()[-1].calls_observed == expected_calls
        assert not oq.reports()[-1].cache_hit


@torch.no_grad()
def test_reset_forgets_what_this_process_knows(inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    step = compiled(model)
    for _ in range(3):
        step(X)
    oq.reset()
    assert oq.reports() == []
    torch._dynamo.reset()
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", os.environ["ONLINEQUANT_CACHE_DIR"] + "-other")
    step = compiled(model)
    assert torch.equal(step(X), model(X))
    assert oq.reports()[-1].calls_observed == 1


@torch.no_grad()
def test_a_budget_keeps_the_most_sensitive_layers_in_float(inductor: EagerInductor) -> None:
    def run(budget: float) -> oq.Report:
        torch._dynamo.reset()
        oq.reset()
        model = net()
        step = compiled(model, max_error=budget)
        for _ in range(3):
            result = step(X)
        report = oq.reports()[-1]
        assert report.error is not None and report.error <= budget
        assert relative_error(result, model(X)) == pytest.approx(report.error, rel=0.05, abs=1e-6)
        assert f"{report.error:.3g} of a step" in report.table()
        return report

    free = run(1.0)
    assert free.error is not None and free.error > 0.001 and all(d.quantized for d in layers(free))
    some, none = run(0.6 * free.error), run(1e-9)
    in_float = [d.sensitivity or 0 for d in layers(some) if not d.quantized]
    in_8_bit = [d.sensitivity or 0 for d in layers(some) if d.quantized]
    assert in_float and in_8_bit and min(in_float) >= max(in_8_bit)
    assert all("max_error=1e-09" in d.reason for d in layers(none))


class Timed(nn.Module):
    """A model whose time step is a number, of which ``embed`` makes a tensor."""

    def __init__(self, embed: Callable[[float], torch.Tensor]) -> None:
        super().__init__()
        self.embed = embed
        self.net = net()
        self.time = nn.Linear(8, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor, time: float) -> torch.Tensor:
        angles = self.embed(time)[:, None].float() * torch.exp(-torch.arange(4) / 4)
        return self.net(x + self.time(torch.cat([angles.sin(), angles.cos()], -1))[:, :, None, None])


@torch.no_grad()
@pytest.mark.parametrize(
    "embed", [lambda time: torch.tensor([time * 10]), lambda time: torch.full((1,), time)], ids=["tensor", "full"]
)
def test_a_number_as_the_time_step_needs_one_graph(
    embed: Callable[[float], torch.Tensor], inductor: EagerInductor
) -> None:
    model = Timed(embed).eval()
    step = compiled(model)
    for call in range(16):
        time = 1 - call / 16
        error = relative_error(step(X, time), model(X, time))
        assert error < CLOSE if call > 1 else error == 0  # the first was traced for its own number
        is_8_bit = error > 0  # or a number beyond those before has widened ranges
    assert is_8_bit
    assert len(inductor.graphs) == 1
    assert oq.reports()[-1].phase == "quantized"


@torch.no_grad()
def test_a_number_that_must_be_compiled_in_is_reported(
    inductor: EagerInductor, caplog: pytest.LogCaptureFixture
) -> None:
    model = Timed(lambda time: torch.ones(1) * math.sin(time)).eval()
    step = compiled(model)
    for call in range(16):
        time = 1 - call / 16
        assert relative_error(step(X, time), model(X, time)) < CLOSE
    report = oq.reports()[-1]
    assert (report.phase, len(inductor.graphs)) == ("float", 8)
    assert "pass a tensor instead of a number that changes with every call (time)" in report.phase_reason
    assert caplog.text.count("pass a tensor") == 1


class Stumbling(nn.Module):
    """A model that looks rows up, which fails for those that are not there."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(8, 16)
        self.linear = nn.Linear(16, 16)
        self.requires_grad_(False)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.linear(self.rows(indices))


@torch.no_grad()
@pytest.mark.parametrize("wrong_calls", [1, 5])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_call_that_is_wrong_is_the_callers_and_changes_nothing(
    before: int, wrong_calls: int, inductor: EagerInductor, caplog: pytest.LogCaptureFixture
) -> None:
    model, good = Stumbling(), torch.arange(8)
    step = compiled(model)
    for _ in range(before):
        step(good)
    for _ in range(wrong_calls):
        with pytest.raises(IndexError):
            step(good + 1)
    for _ in range(3):
        result = step(good)
    assert 0 < relative_error(result, model(good)) < CLOSE
    assert oq.reports()[-1].phase == "quantized"
    assert not caplog.records


@torch.no_grad()
@pytest.mark.parametrize(("failures", "phase"), [(1, "quantized"), (3, "float")])
def test_observing_that_fails_is_tried_again_a_few_times(
    failures: int, phase: str, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [failures]
    observe = Layer.observe

    def fail(layer: Layer, *args: Any, **named: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise MemoryError("no memory to observe with")
        observe(layer, *args, **named)

    monkeypatch.setattr(Layer, "observe", fail)
    model = net()
    step = compiled(model)
    for _ in range(failures):
        assert torch.equal(step(X), model(X))
    for _ in range(3):
        assert relative_error(step(X), model(X)) < CLOSE
    report = oq.reports()[-1]
    assert report.phase == phase
    assert ("no memory to observe with" in report.phase_reason) == (phase == "float")


@torch.no_grad()
def test_the_report_says_what_the_last_call_ran(inductor: EagerInductor) -> None:
    model = Stumbling()
    step = torch.compile(model, backend=oq.onlinequant, options=OPTIONS, dynamic=True)
    for _ in range(4):
        step(torch.arange(8))
    assert oq.reports()[-1].phase == "quantized"
    assert step(torch.arange(0)).shape == (0, 16)
    reason = "a tensor without values was passed: there is nothing to compute"
    assert (oq.reports()[-1].phase, oq.reports()[-1].phase_reason) == ("float", reason)
    step(torch.arange(8))
    assert oq.reports()[-1].phase == "quantized"


@torch.no_grad()
@pytest.mark.parametrize("factor", [1000.0, math.nan])
@pytest.mark.parametrize("calls", [0, 1])
def test_nothing_is_observed_of_a_call_that_fails(calls: int, factor: float, inductor: EagerInductor) -> None:
    model = net()

    def picking(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return model(x).flatten().index_select(0, index)

    step = torch.compile(picking, backend=oq.onlinequant, options=OPTIONS)
    inside, outside = torch.arange(64), torch.tensor([X.numel()])
    for _ in range(calls):
        step(X, inside)
    with pytest.raises(IndexError):
        step(factor * X, outside.expand(64).contiguous())
    for _ in range(4):
        result = step(X, inside)
    assert oq.reports()[-1].phase == "quantized"
    assert 0 < relative_error(result, picking(X, inside)) < CLOSE
