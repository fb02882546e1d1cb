"""What a key changes with and, as important, what not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.analysis import graph_key
from onlinequant_backend.kernels import cpu_providers
from onlinequant_backend.kernels.formats import INT8, ONEDNN, ONEDNN_7, Format
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.model_process import ModelProcess
from tests.helpers.small import CLOSE, WIDE, X, compiled, entries, forget_everything, small
from tests.helpers.tiny import noise, relative_error

PARTS = ("portable", "weights", "machine", "graph")


@pytest.fixture(autouse=True)
def _eager(inductor: EagerInductor) -> Iterator[None]:
    with torch.no_grad():
        yield


def key(model: nn.Module | None = None, x: torch.Tensor = X, **options: Any) -> str:
    """The key of a model that a new process calls for the first time."""
    forget_everything()
    compiled(model or small(), options)(x)
    return oq.reports()[-1].key


def changed(before: str, after: str) -> set[str]:
    """Which parts of two keys differ."""
    assert len(before) == len(after) == 64
    pairs = zip(range(0, 64, 16), PARTS, strict=True)
    return {part for start, part in pairs if before[start : start + 16] != after[start : start + 16]}


def test_the_same_model_in_the_same_settings_has_the_same_key() -> None:
    first = key()
    assert key() == first
    model = small()
    assert key(model) == key(model) == first
    assert key(x=noise(*X.shape, seed=7)) == first
    with torch.inference_mode():
        assert changed(first, key(x=X.clone())) == set()


def test_two_processes_that_hash_differently_have_the_same_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a graph with symbolic sizes as well."""
    with contextlib.ExitStack() as stack:
        processes = []
        for seed in ("1", "2"):
            monkeypatch.setenv("PYTHONHASHSEED", seed)
            processes.append(stack.enter_context(ModelProcess(tmp_path / seed, new_interpreter=True)))
        for process in processes:
            process.tell("call", *X.shape)
            process.tell("call", *WIDE.shape)
        first, second = ([process.answer()["key"] for _ in range(2)] for process in processes)
    assert first == second
    assert changed(*first) == {"graph"}


def other_checkpoint(model: nn.Module) -> None:
    model.load_state_dict(small(seed=1).state_dict())


def small_lora(model: nn.Module) -> None:
    """One weight, in all of its values and only a little."""
    weight = model.get_parameter("linear.weight")
    weight.addmm_(noise(16, 1), noise(1, 16), alpha=1e-4)


def one_bias(model: nn.Module) -> None:
    model.get_parameter("conv_in.bias")[3].add_(1)


def two_biases_swapped(model: nn.Module) -> None:
    first, second = model.get_parameter("conv_in.bias"), model.get_parameter("linear.bias")
    values = first.clone()
    first.copy_(second)
    second.copy_(values)


def swapped_rows(model: nn.Module) -> None:
    weight = model.get_parameter("linear.weight")
    weight.copy_(weight[torch.randperm(16, generator=torch.Generator().manual_seed(0))])


@pytest.mark.parametrize("change", [other_checkpoint, small_lora, one_bias, two_biases_swapped, swapped_rows])
def test_other_values_of_the_weights(change: Callable[[nn.Module], None]) -> None:
    model = small()
    first = key(model)
    change(model)
    assert changed(first, key(model)) == {"weights"}


def test_weights_that_are_replaced_by_equal_ones() -> None:
    model = small()
    first = key(model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert key(model.requires_grad_(False)) == first


def test_a_merged_lora_is_seen_in_weights_of_any_size() -> None:
    for shape in ((4,), (1024, 1024), (320, 4, 3, 3), (3, 1, 7)):
        for layout in (torch.contiguous_format, torch.channels_last):
            weight = noise(*shape)
            if len(shape) == 4:
                weight = weight.contiguous(memory_format=layout)
            before = graph_key.fingerprint({"weight": weight})
            assert graph_key.fingerprint({"weight": weight.clone()}) == before
            weight += 0.01 * noise(shape[0], *[1] * (len(shape) - 1), seed=2)
            assert graph_key.fingerprint({"weight": weight}) != before


def test_a_fingerprint_knows_names_shapes_dtypes_and_layouts() -> None:
    weight = noise(8, 8, 2, 2)
    variants = [
        {"weight": weight},
        {"other": weight},
        {"weight": weight.view(8, 32)},
        {"weight": weight.bfloat16()},
        {"weight": weight.view(torch.int32)},
        {"weight": weight.to(memory_format=torch.channels_last)},
        {"weight": weight, "bias": weight[0]},
        {"weight": weight[:, :, :1]},
    ]
    assert len({graph_key.fingerprint(variant) for variant in variants}) == len(variants)
    forwards, backwards = {"a": weight, "b": -weight}, {"b": -weight, "a": weight}
    assert graph_key.fingerprint(forwards) == graph_key.fingerprint(backwards)


@pytest.mark.parametrize(
    "x",
    [WIDE, noise(1, 4, 16, 4), X.to(memory_format=torch.channels_last), X.expand(2, 4, 8, 8)],
    ids=["shape", "shape of equal size", "strides", "batch of strides 0"],
)
def test_another_input(x: torch.Tensor) -> None:
    assert changed(key(), key(x=x)) == {"graph"}


def test_another_dtype() -> None:
    dtype = torch.bfloat16
    assert changed(key(), key(small().to(dtype), X.to(dtype))) == {"weights", "graph"}
    plain = key()
    with torch.autocast("cpu", dtype):
        assert changed(plain, key()) == {"graph"}


def test_another_layout_of_the_weights() -> None:
    model = small().to(memory_format=torch.channels_last)
    assert changed(key(), key(model)) == {"weights", "graph"}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"calibration_steps": 3}, ("portable", "graph")),
        ({"calibration_method": "minmax"}, ("portable", "graph")),
        ({"sensitivity": "end_to_end"}, ("portable", "graph")),
        ({"precision": "fp8"}, ("portable", "machine", "graph")),
        ({"quantized_conv_percentage": 50}, ("graph",)),
        ({"linear_compute_density_threshold": 1}, ("graph",)),
        ({"shapes": "static"}, ("graph",)),
        ({"inductor": {"epilogue_fusion": False}}, ("graph",)),
        ({"mode": "max-autotune-no-cudagraphs"}, ("graph",)),
        ({"cache_size_limit": 1}, ()),
        ({"lock_timeout": 1}, ()),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    assert changed(key(), key(**options)) == set(parts)


def test_another_cache_directory(tmp_path: Path) -> None:
    assert key(cache_dir=str(tmp_path / "other")) == key()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("onlinequant_backend.analysis.graph_key.source_digest", lambda: "other"),
        ("torch.__version__", "2.99.0"),
        ("onlinequant_backend.analysis.graph_key._triton_version", lambda: "99"),
        ("onlinequant_backend.torch_internals.hardware.int8_instructions", lambda: "other"),
    ],
)
def test_another_machine(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    first = key()
    monkeypatch.setattr(name, value)
    assert changed(first, key()) == {"machine"}


@pytest.mark.parametrize(
    ("formats", "parts"),
    [((ONEDNN, ONEDNN_7), {"machine"}), ((ONEDNN, INT8), {"portable", "machine"})],
    ids=["another CPU", "a GPU"],
)
def test_another_format_of_int8(
    formats: tuple[Format, Format], parts: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration with zero points serves other weights of the CPU, but no activations that are symmetric."""
    both = []
    for format in formats:
        monkeypatch.setattr(cpu_providers.X86, "format", lambda *_, format=format: format)
        both.append(key())
    assert changed(*both) == parts


def test_other_layers_of_equal_weights() -> None:
    """The geometry of a convolution is no part of its weights."""

    class Strided(nn.Module):
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, stride=stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    def model(stride: int) -> nn.Module:
        torch.manual_seed(0)
        return Strided(stride).requires_grad_(False)

    assert changed(key(model(1)), key(model(2))) == {"portable", "graph"}


class Scaled(nn.Module):
    """Two linear layers, between which ``function`` is called."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.function = nn.Linear(8, 8), nn.Linear(8, 8), function
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.function(self.first(x)))


def viewed(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], 2, 4)[:, : x.shape[1]].reshape(x.shape)


def resized(x: torch.Tensor) -> torch.Tensor:
    x = x + torch.zeros((x.shape[0], 1, 8)).broadcast_to(*x.shape) + x.new_full([x.shape[1], 8], 2)
    x = F.layer_norm(x, x.shape[2:])
    return F.interpolate(F.interpolate(x, 2 * x.shape[2]), size=x.shape[2:])


@pytest.mark.parametrize(
    "functions",
    [
        (lambda x: x, lambda x: x * 10),
        (lambda x: x * 10, lambda x: x * 0.1),
        (lambda x: x * 10.0, lambda x: 10.0 - x),
        (lambda x: x.chunk(2, -1)[0].repeat(1, 1, 2), lambda x: x.chunk(2, -1)[1].repeat(1, 1, 2)),
        (lambda x: x + torch.tensor([1, 2]).repeat(4), lambda x: x + torch.tensor([1, 9]).repeat(4)),
        (lambda x: F.max_pool2d(x, 1), lambda x: F.adaptive_max_pool2d(x, 8)),
        (lambda x: x + x.sum([0], keepdim=True), lambda x: x + x.sum([1], keepdim=True)),
        (lambda x: x + x[:, 0, None], lambda x: x + x[:, 1, None]),
    ],
)
def test_other_operations_of_equal_layers(functions: tuple[Callable[[torch.Tensor], torch.Tensor], ...]) -> None:
    """They read other values: what was observed in one is not for the other, on no machine."""
    first, second = (key(Scaled(function), noise(2, 8, 8)) for function in functions)
    assert changed(first, second) == {"portable", "graph"}
    assert oq.reports()[-1].cache_hit is False


@pytest.mark.parametrize("function", [viewed, lambda x: x + torch.arange(x.shape[1])[:, None], resized])
def test_equal_operations_at_other_sizes(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Scaled(function)
    forget_everything()
    step = compiled(model)
    found = []
    for x in (noise(2, 4, 8), noise(3, 6, 8)):
        for _ in range(3):
            step(x)
        found.append(oq.reports()[-1].key)
    assert [report.calls_observed for report in oq.reports()] == [2, 0]  # the second is for all sizes
    assert changed(*found) == {"graph"}
    assert changed(found[0], key(model, noise(3, 6, 8))) == {"graph"}


def test_ranges_of_one_graph_are_not_kept_for_another_one_of_its_model() -> None:
    """Where both are traced in one process, the second runs with the ranges of the first, until they are outgrown."""
    model = Scaled(lambda x: x * 0.01)
    other = Scaled(lambda x: x * 1.0)
    other.first, other.second = model.first, model.second
    x = noise(64, 8)
    forget_everything()
    for step in (compiled(model), compiled(other)):
        for _ in range(3):
            step(x)
    assert [report.calls_observed for report in oq.reports()] == [2, 0]
    assert len(entries()) == 1
    key(other, x)
    assert oq.reports()[-1].cache_hit is False


def of_its_own(factor: float) -> nn.Module:
    """A model of a class of its own, with a function of its own that Dynamo does not look into."""

    @torch.compiler.allow_in_graph
    def times(x: torch.Tensor) -> torch.Tensor:
        return x * factor

    class Own(Scaled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(times(self.first(x)))

    return Own(times)


def test_functions_that_were_made_alike() -> None:
    """Only this process can tell them apart, so nothing of them is kept."""
    models = [of_its_own(factor) for factor in (1.0, 100.0)]
    forget_everything()
    x = noise(64, 8)
    for step, model in [(compiled(model), model) for model in models]:
        for _ in range(3):
            result = step(x)
        assert 0 < relative_error(result, model(x)) < CLOSE
    assert [report.calls_observed for report in oq.reports()] == [2, 2]
    assert entries() == []
