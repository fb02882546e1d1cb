"""The hook, on a stand-in for ComfyUI's ModelPatcher that has the same few methods. Inductor is left out, for speed."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import time
import types
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.analysis import graph_key
from onlinequant_backend.comfy_integration import compiled_method
from onlinequant_backend.comfy_integration.model_patch import (
    APPLY_MODEL,
    KEY,
    OWN_KEY,
    SAMPLER_SAMPLE,
    quantize_model,
    record_of_model,
)
from onlinequant_backend.runtime.set_registry import known_sets
from onlinequant_backend.torch_internals import inductor_interface
from tests.helpers.small import WIDE, Small, X, small, texts_into
from tests.helpers.tiny import OPTIONS, noise, relative_error

SIGMAS = torch.tensor([4.0, 2.0, 1.0, 0.0])


class Denoiser(Small):
    """As ComfyUI's UNet: ``forward`` runs the wrappers of other nodes, ``_forward`` computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Patcher:
    """What the hook uses of a ModelPatcher, and the way in which a sampler calls the model."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.model = SimpleNamespace(diffusion_model=denoiser)
        self.wrappers: dict[tuple[str, str], list[Callable[..., Any]]] = {}

    def clone(self) -> Patcher:
        other = Patcher(self.model.diffusion_model)
        other.wrappers = {key: list(wrappers) for key, wrappers in self.wrappers.items()}
        return other

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.pop((kind, key), None)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault((kind, key), []).append(wrapper)

    def get_wrappers(self, kind: str, key: str) -> list[Callable[..., Any]]:
        return self.wrappers.get((kind, key), [])

    @torch.no_grad()
    def apply(self, x: torch.Tensor = X) -> torch.Tensor:
        """One call of the model."""

        def executor(x: torch.Tensor) -> torch.Tensor:
            return self.model.diffusion_model(x)

        executor.class_obj = self.model  # type: ignore[attr-defined]
        return self._wrapped(APPLY_MODEL, KEY, executor, x)

    def run(self, x: torch.Tensor = X, interrupted_after: int | None = None) -> list[torch.Tensor]:
        """The model's answer at each step of a run, which the sampler reports to a callback."""
        results: list[torch.Tensor] = []
        reported: list[int] = []

        def sampler(_guider: object, sigmas: torch.Tensor, _extra: object, callback: Callable[..., Any]) -> None:
            for step in range(len(sigmas) - 1):
                if step == interrupted_after:
                    raise KeyboardInterrupt
                results.append(self.apply(x))
                callback(step, "denoised", "x", len(sigmas) - 1)

        with contextlib.suppress(KeyboardInterrupt):
            self._wrapped(SAMPLER_SAMPLE, OWN_KEY, sampler, None, SIGMAS, {}, lambda step, *_: reported.append(step))
        assert reported == list(range(len(results)))
        return results

    def _wrapped(self, kind: str, key: str, executor: Callable[..., Any], *args: Any) -> Any:
        wrappers = self.get_wrappers(kind, key)
        assert len(wrappers) <= 1
        return wrappers[0](executor, *args) if wrappers else executor(*args)


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_interface, "compile_fx", lambda graph, inputs, options, outside_dynamo: graph)


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


@pytest.fixture
def told() -> list[str]:
    return []


def patched(model: Patcher, told: list[str], whole_run: bool = True, **options: Any) -> Patcher:
    clone = quantize_model(model, {**OPTIONS, **options}, whole_run, texts_into(told))
    assert isinstance(clone, Patcher)
    return clone


def is_8_bit(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return not torch.equal(result, expected) and relative_error(result, expected) < 0.08


def test_the_first_run_is_observed_and_the_second_is_in_8_bit(denoiser: Denoiser, told: list[str]) -> None:
    model, expected = patched(Patcher(denoiser), told), denoiser(X)
    assert all(torch.equal(result, expected) for result in model.run())
    observing = [text.split(" (")[0] for text in told if text.startswith("observing")]
    assert observing == [f"observing {step} of 3" for step in (1, 2, 3)]
    assert told[-1] == "Denoiser: quantized: 3 of 3 layers in int8"
    told.clear()
    assert all(is_8_bit(result, expected) for result in model.run())
    assert told == ["Denoiser: quantized: 3 of 3 layers in int8"]


def test_an_interrupted_run_is_observed_again(denoiser: Denoiser, told: list[str]) -> None:
    model, expected = patched(Patcher(denoiser), told), denoiser(X)
    for _ in range(2):
        model.run(interrupted_after=2)
        assert told[-1].startswith("observing 2 of 3")
    assert all(torch.equal(result, expected) for result in model.run())
    assert all(is_8_bit(result, expected) for result in model.run())


def test_what_was_seen_is_recorded(denoiser: Denoiser, told: list[str]) -> None:
    model = patched(Patcher(denoiser), told)
    assert record_of_model(Patcher(denoiser)) is None
    record = record_of_model(model)
    assert record is not None and not record.reports and not record.snapshot().paces
    model.run()
    model.run()
    assert record.reports == oq.reports() and len(record.reports) == 1
    paces = record.snapshot().paces
    assert {kind: pace.steps for kind, pace in paces.items()} == {"calibrating": 1, "quantized": 2}  # the first traced
    assert all(0 < pace.milliseconds < 60_000 for pace in paces.values())
    # Another node with the same options goes on with it; one with others does not.
    assert record_of_model(patched(Patcher(denoiser), told)) is record
    assert record_of_model(patched(Patcher(denoiser), told, precision="float")) is not record


def test_a_model_is_observed_again_when_asked_for_and_not_compiled_again(denoiser: Denoiser, told: list[str]) -> None:
    model, expected = patched(Patcher(denoiser), told), denoiser(X)
    model.run()
    record = record_of_model(model)
    assert record is not None
    assert [record.is_to_observe_again(number) for number in (3, 3, 4, 4)] == [False, False, True, False]
    assert known_sets.observe_again(list(Denoiser().parameters())) == 0
    assert known_sets.observe_again(list(denoiser.parameters())) == 1
    record.start_over()
    told.clear()
    assert all(torch.equal(result, expected) for result in model.run(X))
    assert [text.split(" (")[0] for text in told[:3]] == [f"observing {step} of 3" for step in (1, 2, 3)]
    assert told[-1].startswith("Denoiser: quantized: 3 of 3 layers in int8")
    assert all(is_8_bit(result, expected) for result in model.run(X))
    assert len(oq.reports()) == 1 and record.reports[0].calls_observed >= 3


def test_a_number_of_calls_goes_on_in_the_same_run(denoiser: Denoiser, told: list[str]) -> None:
    model, expected = patched(Patcher(denoiser), told, whole_run=False), denoiser(X)
    assert [is_8_bit(result, expected) for result in model.run()] == [False, False, True]


def test_calls_outside_of_a_run_are_counted(denoiser: Denoiser, told: list[str]) -> None:
    model, expected = patched(Patcher(denoiser), told), denoiser(X)
    assert [is_8_bit(model.apply(), expected) for _ in range(3)] == [False, False, True]


def test_the_model_itself_stays_as_it_is(denoiser: Denoiser, told: list[str]) -> None:
    model, expected = Patcher(denoiser), denoiser(X)
    quantized = patched(model, told)
    quantized.run()
    quantized.run()
    assert torch.equal(model.apply(X), expected)
    assert "_forward" not in vars(denoiser) and not model.wrappers


def test_the_last_node_that_compiles_counts(denoiser: Denoiser, told: list[str]) -> None:
    model = Patcher(denoiser)
    model.add_wrapper_with_key(APPLY_MODEL, KEY, lambda *_arguments: pytest.fail("TorchCompileModel's"))
    first_told: list[str] = []
    patched(patched(model, first_told), told).run()
    assert told and not first_told


def test_the_node_executed_again_neither_observes_nor_compiles_again(denoiser: Denoiser, told: list[str]) -> None:
    for _ in range(2):
        patched(Patcher(denoiser), told).run()
    assert len(oq.reports()) == 1
    again: list[str] = []
    assert all(is_8_bit(result, denoiser(X)) for result in patched(Patcher(denoiser), again).run())
    assert len(oq.reports()) == 1 and again == ["Denoiser: quantized: 3 of 3 layers in int8"]


class Scaled(Denoiser):
    scale = 1

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return super()._forward(x) * self.scale


def test_many_graphs_of_one_model_are_all_compiled(told: list[str]) -> None:
    denoiser = Scaled().eval().requires_grad_(False)
    model = patched(Patcher(denoiser), told)
    for scale in range(1, 11):  # more than Dynamo makes of one method by default
        denoiser.scale = scale
        model.run()
        assert all(is_8_bit(result, denoiser(X)) for result in model.run())
    assert len(oq.reports()) == 10


def test_models_of_one_class_are_traced_each_for_itself(told: list[str]) -> None:
    guarded = []
    # Both live at the same time: a model may get the code of one that is gone.
    for scale, denoiser in enumerate([Scaled().eval().requires_grad_(False) for _ in range(2)], start=1):
        denoiser.scale = scale
        model = patched(Patcher(denoiser), told)
        model.run()
        assert all(is_8_bit(result, denoiser(X)) for result in model.run())
        guarded.append(len(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(own_code(denoiser))))
    assert guarded == [1, 1]


def own_code(denoiser: nn.Module) -> types.CodeType:
    (copy,) = compiled_method._copies[denoiser].values()
    return copy.__code__


def test_a_model_without_an_inner_forward_is_compiled_whole(told: list[str]) -> None:
    model = small()
    quantized, expected = patched(Patcher(model), told), model(X)
    quantized.run()
    assert all(is_8_bit(result, expected) for result in quantized.run())
    assert "forward" not in vars(model)


def test_another_extension_s_method_is_compiled_and_put_back(denoiser: Denoiser, told: list[str]) -> None:
    method = denoiser._forward
    vars(denoiser)["_forward"] = lambda x: method(x) * 2
    theirs, expected = vars(denoiser)["_forward"], denoiser(X)
    model = patched(Patcher(denoiser), told)
    model.run()
    assert is_8_bit(model.apply(X), expected)
    assert vars(denoiser)["_forward"] is theirs


def test_a_mistake_in_the_options_leaves_the_model_in_float(denoiser: Denoiser, told: list[str]) -> None:
    model, expected = patched(Patcher(denoiser), told, precision="int7"), denoiser(X)
    assert all(torch.equal(result, expected) for result in model.run())
    *before, text = told
    assert all(each.startswith("tracing the model") for each in before)
    assert text.startswith("in float, since it failed (not tried again)") and "int7" in text
    assert "_forward" not in vars(denoiser)
    told.clear()
    assert all(torch.equal(result, expected) for result in model.run()) and not told


def test_what_fails_is_tried_again_in_the_next_run(
    denoiser: Denoiser, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = patched(Patcher(denoiser), told), denoiser(X)
    with monkeypatch.context() as broken:
        broken.setattr(graph_key, "identity", lambda *_: 1 // 0)
        assert all(torch.equal(result, expected) for result in model.run())
        assert told[-1].startswith("in float, since it failed (tried again at the next run)")
    model.run()
    assert told[-1] == "Denoiser: quantized: 3 of 3 layers in int8"
    assert all(is_8_bit(result, expected) for result in model.run())


def test_what_always_fails_is_left_alone_after_three_runs(
    denoiser: Denoiser, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = list[int]()

    def fail(*_: object) -> None:
        attempts.append(1)
        raise ZeroDivisionError

    monkeypatch.setattr(graph_key, "identity", fail)
    model, expected = patched(Patcher(denoiser), told), denoiser(X)
    for _ in range(5):
        assert all(torch.equal(result, expected) for result in model.run())
    assert len(attempts) == 3
    assert told[-1].startswith("in float, since it failed (not tried again)")


def test_an_error_of_the_model_s_own_is_raised_and_held_against_nobody(denoiser: Denoiser, told: list[str]) -> None:
    model = patched(Patcher(denoiser), told)
    with pytest.raises(RuntimeError, match="channels"):
        model.apply(X[:, :2])
    assert all(text.startswith("tracing the model") for text in told) and "_forward" not in vars(denoiser)
    model.run()
    assert is_8_bit(model.apply(X), denoiser(X))


def test_no_garbage_is_searched_for_while_dynamo_traces(denoiser: Denoiser, told: list[str]) -> None:
    collected = list[str]()

    def note(_phase: str, _details: object) -> None:
        collected.extend(told[-1:])

    model = patched(Patcher(denoiser), told)
    plain = torch.compile(small(), backend="eager")
    gc.callbacks.append(note)
    try:
        model.run()
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(note)
    assert any(text.startswith("tracing") for text in told)
    assert not any(text.startswith("tracing") for text in collected)
    plain(X)  # in the same thread, and none of ours
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="channels"):
        model.apply(X[:, :2])
    assert gc.isenabled()


def test_a_second_model_is_no_other_size_of_the_first(told: list[str]) -> None:
    """It finds what the first one has left in the cache, although that has met two sizes."""

    def load() -> Denoiser:
        torch.manual_seed(0)
        return Denoiser().eval().requires_grad_(False)

    first = patched(Patcher(load()), told)
    for size in (X, WIDE, WIDE):
        first.run(size)
    known = [report.key for report in oq.reports()]
    assert len(set(known)) == 2
    del first
    gc.collect()
    denoiser = load()
    second = patched(Patcher(denoiser), told)
    second.run()
    assert all(is_8_bit(result, denoiser(X)) for result in second.run())
    record = record_of_model(second)
    assert record is not None and [report.key for report in record.reports] == known[:1]
    # What it meets next is an other size of its own.
    second.run(WIDE)
    second.run(noise(2, 4, 16, 8))
    assert [report.key for report in record.reports] == known


class Model(nn.Module):
    """ComfyUI's around a denoiser, with what its patchers leave there and other ways to the denoiser."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = denoiser
        self.dynamic_pins = "pinned memory"
        self.dynamic_img_pad = self.patched_in_the_last_run = True
        self.device = "where it was loaded last"
        self.scale = functools.partial(denoiser.forward)
        self.apply = denoiser.forward  # type: ignore[assignment]
        self.parts = {"all": [denoiser]}


class Dynamic(Patcher):
    """A patcher of a model whose weights are loaded on demand, and its clones in place."""

    def __init__(self, model: Model | None, *_devices: object, dynamic: bool = False) -> None:
        super().__init__(nn.Module())
        self.model = model  # type: ignore[assignment]
        self.load_device = self.offload_device = "cpu"
        self.hook_backup: dict[str, Any] = {}
        self.callbacks: dict[tuple[str, str], list[Callable[..., Any]]] = {}
        self.parent: Dynamic | None = None
        self.dynamic = dynamic
        self.error: Exception | None = None
        self.unloaded: list[float] = []

    def is_dynamic(self) -> bool:
        return self.dynamic

    def get_clone_model_override(self) -> Any:
        return self.model

    def clone(self, disable_dynamic: bool = False, model_override: Model | None = None) -> Dynamic:
        if disable_dynamic and self.error is not None:
            raise self.error
        assert (model_override is not None) == (disable_dynamic and self.dynamic), "it would be loaded again"
        other = type(self)(model_override or self.model, dynamic=self.dynamic and not disable_dynamic)
        other.parent = self
        other.wrappers = {key: list(wrappers) for key, wrappers in self.wrappers.items()}
        other.callbacks = {key: list(callbacks) for key, callbacks in self.callbacks.items()}
        return other

    def add_callback_with_key(self, kind: str, key: str, callback: Callable[..., Any]) -> None:
        self.callbacks.setdefault((kind, key), []).append(callback)

    def get_callbacks(self, kind: str, key: str) -> list[Callable[..., Any]]:
        return self.callbacks.get((kind, key), [])

    def partially_unload(self, _device: object, size: float) -> None:
        self.unloaded.append(size)

    def unpatch_model(self, _device: object, unpatch_weights: bool) -> None:
        assert not unpatch_weights
        vars(self.model).pop("patched_in_the_last_run", None)

    def patch_hook_weight_to_device(self, key: str) -> None:
        self.model.get_parameter(key).data.mul_(2)

    def detach(self, unpatch_all: bool) -> None:
        (callback,) = self.get_callbacks("on_detach_after", "onlinequant")
        callback(self, unpatch_all)


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy.model_patcher", types.SimpleNamespace(ModelPatcher=Dynamic))  # type: ignore[arg-type]


@pytest.mark.usefixtures("comfyui")
def test_a_twin_has_the_same_weights_and_nothing_else_of_the_model(denoiser: Denoiser, told: list[str]) -> None:
    layer = nn.Linear(3, 3, bias=False)
    layer.weight_comfy_model_dtype = torch.float16  # type: ignore[assignment]
    denoiser.layer, denoiser.tied = layer, nn.Linear(3, 3)
    denoiser.tied.weight = layer.weight
    layer.register_buffer("table", torch.zeros(2))
    layer.table_comfy_model_dtype = torch.float16  # type: ignore[assignment]
    original = Model(denoiser)
    loader = Dynamic(original, dynamic=True)
    twin: Any = patched(loader, told).model
    assert loader.unloaded and twin.dynamic_img_pad
    assert not {"dynamic_pins", "device", "patched_in_the_last_run"} & vars(twin).keys()
    for name, weight in original.named_parameters():
        same = twin.get_parameter(name)
        assert same is not weight
        if name != "diffusion_model.layer.weight":
            assert same.data_ptr() == weight.data_ptr()
    assert twin.diffusion_model.layer.weight.dtype == twin.diffusion_model.layer.table.dtype == torch.float16
    assert layer.weight.dtype == layer.table.dtype == torch.float32
    assert twin.diffusion_model.tied.weight is twin.diffusion_model.layer.weight
    assert twin.apply.__self__ is twin.parts["all"][0] is twin.diffusion_model is not denoiser
    assert twin.scale.func.__self__ is twin.diffusion_model
    assert original.apply.__self__ is original.parts["all"][0] is denoiser  # type: ignore[attr-defined]


@pytest.mark.usefixtures("comfyui")
def test_a_hook_writes_into_a_twin_s_own_weights(denoiser: Denoiser, told: list[str]) -> None:
    """Those of the original are mapped from a file, to be read."""
    loader = Dynamic(Model(denoiser), dynamic=True)
    quantized, name = patched(loader, told), next(name for name, _ in Model(denoiser).named_parameters())
    theirs, ours = loader.model.get_parameter(name), quantized.model.get_parameter(name)
    before = theirs.clone()
    for _ in range(2):
        quantized.patch_hook_weight_to_device(key=name)  # type: ignore[attr-defined]
    assert torch.equal(theirs, before) and torch.equal(ours, 4 * before)
    assert quantized.model.get_parameter(name) is ours


@pytest.mark.usefixtures("comfyui")
def test_a_model_loaded_on_demand_has_one_twin_that_dies_with_it(denoiser: Denoiser, told: list[str]) -> None:
    loader = Dynamic(Model(denoiser), dynamic=True)
    for _ in range(2):  # each with a LoRA of its own, say
        quantized = patched(loader.clone(), told)
        quantized.run()
    twin = weakref.ref(quantized.model)
    assert quantized.model is not loader.model and not quantized.is_dynamic()
    assert all(is_8_bit(result, denoiser(X)) for result in quantized.run())
    assert len(oq.reports()) == 1
    del quantized
    gc.collect()
    assert twin() is not None
    del loader
    gc.collect()
    assert twin() is None


@pytest.mark.usefixtures("comfyui")
@pytest.mark.parametrize(
    "error", [RuntimeError("it was not loaded from a file"), TypeError("no argument of that name")]
)
def test_a_model_that_cannot_be_loaded_in_another_way_stays_as_it_is(
    denoiser: Denoiser, told: list[str], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    loader = Dynamic(Model(denoiser), dynamic=True)
    loader.error = error
    assert patched(loader, told).model is loader.model
    assert str(error) in caplog.text and "--disable-dynamic-vram" in caplog.text


class Checkpoint(Denoiser):
    """Of a kind that no other test has left functions of."""


def test_a_model_in_place_of_one_that_is_gone_is_not_traced(told: list[str]) -> None:
    """ComfyUI loads a checkpoint anew whenever another one was in its place."""
    torch._dynamo.utils.counters.clear()
    for seed in range(3):
        torch.manual_seed(seed)
        denoiser = Checkpoint().eval().requires_grad_(False)
        model, expected = patched(Patcher(denoiser), told), denoiser(X)
        assert all(torch.equal(result, expected) for result in model.run())
        assert all(is_8_bit(result, expected) for result in model.run())
        is_there = weakref.ref(denoiser)
        del denoiser, model
        deadline = time.monotonic() + 10
        while is_there() is not None:  # the thread that has compiled may be about to end
            gc.collect()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert traces() == 1
    models = [Checkpoint().eval().requires_grad_(False) for _ in range(2)]
    for denoiser in models:  # side by side, so that neither's guards are asked about the other
        assert all(torch.equal(result, denoiser(X)) for result in patched(Patcher(denoiser), told).run())
    assert traces() == 2


class Hooked(Denoiser):
    """Of another kind."""


def test_a_model_with_hooks_in_place_of_one_without(told: list[str]) -> None:
    """Dynamo does not ask about them."""
    for has_hooks in (False, True):
        denoiser = Hooked().eval().requires_grad_(False)
        if has_hooks:
            denoiser.get_submodule("linear").register_forward_hook(lambda module, given, result: result * 3 + 1)
        model, expected = patched(Patcher(denoiser), told), denoiser(X)
        assert all(torch.equal(result, expected) for result in model.run())
        assert all(is_8_bit(result, expected) for result in model.run())
        del denoiser, model
        gc.collect()


def test_a_method_that_holds_its_model_does_not_keep_it(told: list[str]) -> None:
    """As one that another node has put in the place of the model's own."""
    denoiser = Denoiser().eval().requires_grad_(False)
    holding = functools.partial(lambda before: lambda _, x: before(x) * 1.0, denoiser._forward)()
    denoiser._forward = types.MethodType(holding, denoiser)  # type: ignore[method-assign]
    model, expected = patched(Patcher(denoiser), told), denoiser(X)
    model.run()
    assert all(is_8_bit(result, expected) for result in model.run())
    is_there = weakref.ref(denoiser)
    del denoiser, model, holding
    gc.collect()
    assert is_there() is None


def traces() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("comfyui")
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_comfyui_unloads_is_released_and_comes_back_without_a_trace(
    denoiser: Denoiser, told: list[str], dynamic: bool
) -> None:
    loader = Dynamic(Model(denoiser), dynamic=dynamic)
    quantized = patched(loader, told)
    quantized.run()
    module, size = quantized.model.diffusion_model, oq.copied_bytes(quantized.model.diffusion_model)
    # When no clone is left, ComfyUI takes its parent for what is loaded.
    for patcher in (quantized, quantized.clone(), quantized.parent):
        patcher.detach(False)
        assert oq.copied_bytes(module) == size > 0
        patcher.detach(True)
        assert oq.copied_bytes(module) == 0
        assert all(is_8_bit(result, denoiser(X)) for result in quantized.run())
    assert len(oq.reports()) == 1
