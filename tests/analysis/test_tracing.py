"""How Dynamo traces for the backend: few graphs for many sizes, and never worse than without it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.graph import dynamic_shapes
from onlinequant_backend.torch_internals import inductor_interface
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.small import CLOSE, compiled
from tests.helpers.tiny import OPTIONS, net, noise, relative_error

Call = tuple[Any, ...]


@pytest.fixture(autouse=True)
def inductor(inductor: EagerInductor) -> EagerInductor:
    torch._dynamo.utils.counters.clear()
    return inductor


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def made(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


class Masked(nn.Module):
    """Two inputs' sizes meet in a view: it can only be traced where both are 1."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask.view(len(x), -1, mask.shape[-1])
        return F.scaled_dot_product_attention(self.q(x), self.k(text), text, attn_mask=mask)


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.t = nn.Linear(16, 16), nn.Linear(1, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.a(x) * self.t(t[:, None]).view(len(x), -1, 16)


class OneStep(nn.Module):
    """A time step for a whole batch: its size of 1 is broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + t


class Named(nn.Module):
    """A number that is a part of a name, and one with a default: neither can be a symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleDict({"2-1": nn.Linear(16, 16)})

    def forward(self, x: torch.Tensor, patch: int, frames: int = 1) -> torch.Tensor:
        return self.linears[f"{patch}-{frames}"](x)


class Sliced(nn.Module):
    """Slicing by a symbol makes a size that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.positions = nn.Linear(16, 16), nn.Parameter(torch.empty(8, 16))

    def forward(self, x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        frames, rows = shape
        positions = self.positions[0 : 0 + frames].view(frames, 1, -1).expand(frames, rows, -1)
        return self.linear(x) + positions.reshape(frames * rows, -1)


def masked(rows: int) -> Call:
    return noise(1, rows, 16), noise(1, 7, 16), torch.ones(1, 7).bool()


MODELS: dict[str, tuple[Callable[[], nn.Module], Sequence[Call]]] = {
    "a view of another input": (Masked, [masked(8), masked(12), masked(20)]),
    "a view of the time steps": (Viewed, [(noise(b, n, 16), torch.ones(b)) for b, n in ((1, 8), (1, 12), (2, 12))]),
    "a broadcast": (OneStep, [(noise(2, n, 16), noise(1, 1, 16)) for n in (8, 12, 20)]),
    "numbers in a name": (Named, [(noise(2, n, 16), 2, 1) for n in (8, 12, 20)]),
    "a slice": (Sliced, [(noise(2, n, 16), (1, n)) for n in (8, 12, 20)]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_every_size_runs_in_8_bit(name: str) -> None:
    kind, calls = MODELS[name]
    model = made(kind())
    step = compiled(model)
    for call in calls:
        for _ in range(3):
            assert relative_error(step(*call), model(*call)) < CLOSE
        assert not torch.equal(step(*call), model(*call))
    assert {report.phase for report in oq.reports()} == {"quantized"}
    assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs() <= len(calls)


@torch.no_grad()
def test_an_error_is_the_users_own_and_changes_nothing() -> None:
    model = net()
    step = compiled(model)
    for size in (8, 8, 8):
        step(noise(1, 4, size, size))
    with pytest.raises(Exception, match="to have 4 channels"):
        step(noise(1, 5, 8, 8))
    for batch, size in ((1, 12), (2, 8), (3, 16)):
        x = noise(batch, 4, size, size)
        assert relative_error(step(x), model(x)) < CLOSE
    assert graphs() == 2


class Casting:
    """Casts a layer's weights around each call, as diffusers' layerwise casting does."""

    def __init__(self, layer: nn.Module) -> None:
        self.original = layer.forward
        layer.forward = functools.partial(self.forward, layer)  # type: ignore[method-assign]
        layer.to(torch.float16)

    def forward(self, layer: nn.Module, *args: Any) -> Any:
        layer.to(torch.float32)
        result = self.original(*args)
        layer.to(torch.float16)
        return result


@torch.no_grad()
def test_layers_that_are_called_by_a_hook() -> None:
    """Their strides and groups are no sizes, wherever they hang."""
    model = net()
    for layer in (model.conv_in, model.conv_out, model.blocks[0].conv):
        Casting(layer)
    step = compiled(model)
    for size in (8, 8, 8, 12, 12, 12):
        x = noise(1, 4, size, size)
        assert relative_error(step(x), model(x)) < CLOSE
    decisions = [decision for report in oq.reports() for decision in report.decisions]
    assert {decision.reason for decision in decisions if decision.kind != "attention"} == {"selected"}
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert {decision.name for decision in decisions if decision.kind != "attention"} == layers


@torch.no_grad()
def test_a_layer_that_is_an_argument() -> None:
    layer = made(nn.Conv2d(4, 16, 3, padding=1))
    step = torch.compile(lambda layer, x: layer(x).relu(), backend=oq.onlinequant, options=OPTIONS)
    for size in (8, 8, 8, 12, 12, 12):
        x = noise(1, 4, size, size)
        assert relative_error(step(layer, x), layer(x).relu()) < CLOSE
    assert [decision.quantized for report in oq.reports() for decision in report.decisions] == [True, True]


class Spy:
    """A backend that keeps the shapes of what it is given."""

    def __init__(self) -> None:
        self.shapes: list[list[Any]] = []

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.shapes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph_module.forward


def test_gradients_are_traced_as_torch_does() -> None:
    """Inductor cannot put some backward graphs' symbolic strides in order."""
    model, traced = net().requires_grad_(True), []
    step = torch.compile(model, backend=_keeping(traced))
    for size in (8, 12):
        x = noise(1, 4, size, size)
        assert torch.equal(step(x), model(x))
        with torch.no_grad():
            step(x)
    assert [dynamic_shapes.has_symbols(graph_module) for graph_module in traced] == [False, True, True]


def _keeping(traced: list[torch.fx.GraphModule]) -> Callable[..., Any]:
    def keeping(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        traced.append(graph_module)
        return oq.onlinequant(graph_module, inputs, options=OPTIONS)

    return keeping


@torch.no_grad()
def test_what_inductor_cannot_compile_for_all_sizes_is_traced_for_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(graph_module: torch.fx.GraphModule, inputs: Sequence[Any], *_: Any, **__: Any) -> Callable[..., Any]:
        if sum(isinstance(value, torch.SymInt) for value in inputs) > 1:
            raise TypeError("cannot determine truth value of Relational")
        return graph_module

    monkeypatch.setattr(inductor_interface, "compile_fx", failing)
    model = net()
    step = compiled(model, {"precision": "float"})
    for size in ((8, 8), (8, 12)):
        x = noise(1, 4, *size)
        assert torch.equal(step(x), model(x))


@torch.no_grad()
def test_another_backend_traces_as_if_it_were_alone() -> None:
    """Also the code that ours has traced, at other sizes."""
    sizes = [noise(1, 4, height, 16) for height in (16, 20, 24)]

    def traced() -> str:
        spy, other = Spy(), net(1)
        for x in sizes:
            torch.compile(other, backend=spy)(x)
        return str(spy.shapes)

    alone = traced()
    torch._dynamo.reset()
    step = compiled(net())
    for size in (8, 12):
        step(noise(1, 4, size, size))
    assert traced() == alone


@torch.no_grad()
def test_a_backend_that_hands_on_to_ours() -> None:
    def handing_on(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return oq.onlinequant(graph_module, inputs, options=OPTIONS)

    model = net()
    step = torch.compile(model, backend=handing_on)
    for batch, size in ((1, 8), (1, 8), (1, 12), (2, 8), (3, 20)):
        x = noise(batch, 4, size, size)
        assert relative_error(step(x), model(x)) < CLOSE
    assert graphs() == 2


@torch.no_grad()
def test_two_models_of_a_class_have_a_first_size_each(inductor: EagerInductor) -> None:
    for model, size in ((net(), 8), (net(1), 12)):
        step = compiled(model)
        for _ in range(3):
            step(noise(1, 4, size, size))
    assert [any(isinstance(x, torch.SymInt) for x in inputs) for inputs in inductor.inputs] == [False, False]


@torch.no_grad()
@pytest.mark.parametrize("is_dropped", [False, True])
def test_many_models_of_a_class_with_a_size_each(is_dropped: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo keeps their graphs together, even of models that are gone."""
    kept = []
    for number in range(12):
        model, x = made(Expert()), noise(1, 4 + 2 * number, 16)
        step = compiled(model)
        for _ in range(3):
            picture = step(x)
        assert 0 < relative_error(picture, model(x)) < CLOSE
        kept += [] if is_dropped else [step]
    assert graphs() == 3  # each of the first two has one of its own
    assert not caplog.records


@torch.no_grad()
def test_each_set_of_options_has_a_history_of_its_own() -> None:
    model = made(Expert())
    options = ({"calibration_method": "minmax"}, {"shapes": "static"}, {"calibration_method": "percentile"})
    steps, traced = [compiled(model, each) for each in options], [0, 0, 0]
    for sizes in ((4, 4, 6), (8, 8, 8), (6, 6, 4)):
        for number, size in enumerate(sizes):
            before = graphs()
            for _ in range(3):
                steps[number](noise(1, size, 16))
            traced[number] += graphs() - before
    assert traced == [2, 3, 2]


class Flagged(nn.Module):
    """Flags decide about the graph, or about nothing in it."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.gate = nn.Linear(16, 16), nn.Linear(16, 16)
        self.linear: nn.Module = self.plain
        self.is_scaled = False

    def forward(
        self, x: torch.Tensor, gated: bool = False, as_dict: bool = False, mask: torch.Tensor | None = None
    ) -> Any:
        y = self.linear(x) * (2 if self.is_scaled else 1)
        y = y * self.gate(x) if gated else y
        y = y if mask is None else y * mask
        return {"y": y} if as_dict else (y,)

    def call(self, step: Callable[..., Any], rows: int, kind: str) -> None:
        """Of one kind, which needs a graph of its own, and twice the same."""
        self.is_scaled = kind == "scaled"
        self.linear = nn.Sequential(self.plain) if kind == "adapted" else self.plain
        x = noise(2, rows, 16)
        for _ in range(2):
            step(x, gated=kind == "gated", as_dict=kind == "as_dict", mask=x[0, 0] if kind == "masked" else None)


@torch.no_grad()
@pytest.mark.parametrize("kinds", [("plain", "gated", "as_dict", "scaled"), ("adapted", "plain", "masked")])
def test_a_first_size_is_left_to_calls_with_the_same_flags(kinds: tuple[str, ...]) -> None:
    model = made(Flagged())
    assert isinstance(model, Flagged)
    step = compiled(model)
    for rows, kind in enumerate(kinds, start=8):
        model.call(step, rows, kind)
    for rows in (12, 8):
        for kind in kinds:
            model.call(step, rows, kind)
    assert graphs() == len(kinds) + 1  # one for all sizes each, and the first size's


@torch.no_grad()
@pytest.mark.parametrize("second", [(1, 4), (0, 32)], ids=["small", "an empty batch"])
def test_a_small_second_size_decides_nothing(second: tuple[int, int], inductor: EagerInductor) -> None:
    """The first keeps its own graph, and all others have the layers in 8 bit that the largest has."""
    model, first = net(), noise(2, 4, 32, 32)
    step = compiled(model, {"conv_compute_density_threshold": 6, "linear_compute_density_threshold": 6})
    for _ in range(3):
        step(first)
    picture, compiles = step(first), len(inductor.graphs)
    batch, size = second
    for _ in range(3):
        x = noise(batch, 4, size, size)
        result = step(x)
        assert result.shape == model(x).shape
        assert not x.numel() or relative_error(result, model(x)) < CLOSE
    assert torch.equal(step(first), picture)
    assert len(inductor.graphs) == compiles + bool(noise(batch, 4, size, size).numel())
    third = noise(3, 4, 48, 48)
    step(third)  # of another size: may be done again in float
    for _ in range(2):
        assert 0 < relative_error(step(third), model(third)) < CLOSE
    chosen = [[decision.quantized for decision in report.decisions] for report in oq.reports()]
    assert any(chosen[0]) and all(each == chosen[0] for each in chosen)
    assert graphs() <= 3


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


class Experts(nn.Module):
    """Each behind a break, and with sizes of its own: Dynamo keeps their graphs together, and makes no more than 8."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = []
        for number, expert in enumerate(self.experts):
            torch._dynamo.graph_break()
            results.append(expert(x[:, : 4 + 2 * number]))
        return torch.cat(results, 1)


@torch.no_grad()
def test_blocks_of_one_class_share_their_graphs(caplog: pytest.LogCaptureFixture) -> None:
    model = made(Experts())
    step = compiled(model)
    for rows in (40, 50, 60):
        x = noise(1, rows, 16)
        for _ in range(3):
            picture = step(x)
        assert 0 < relative_error(picture, model(x)) < CLOSE
    assert graphs() <= 3
    assert {report.phase for report in oq.reports()} == {"quantized"}
    assert not caplog.records


@torch.no_grad()
def test_it_is_said_when_dynamo_gives_up(caplog: pytest.LogCaptureFixture) -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor, flag: str) -> torch.Tensor:
            return self.linear(x) * len(flag)

    model, x = made(Flagged()), noise(2, 16)
    step = compiled(model)
    with torch._dynamo.config.patch(recompile_limit=2):
        for flag in ("a", "ab", "abc", "abcd", "abcde"):
            assert relative_error(step(x, flag), model(x, flag)) < CLOSE
    assert sum("Flagged that no graph fits run uncompiled" in record.getMessage() for record in caplog.records) == 1


@torch.no_grad()
def test_a_model_that_is_false_is_a_model() -> None:
    class Broken(Expert):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made(Broken())

        def __len__(self) -> int:
            return 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    step = compiled(Empty())
    for _ in range(3):
        step(noise(2, 16))
    assert {decision.name for report in oq.reports() for decision in report.decisions} == {"inner.linear"}
