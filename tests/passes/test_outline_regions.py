from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor

import onlinequant_backend as oq
from onlinequant_backend.compilation import region_check
from onlinequant_backend.graph import fx_utils
from onlinequant_backend.passes import REWRITE
from onlinequant_backend.passes.outline_regions import outline_regions
from onlinequant_backend.torch_internals import dynamo_interface, inductor_interface
from tests.helpers.graph_probe import GraphProbe
from tests.helpers.small import CLOSE, cache_directory, forget_everything
from tests.helpers.tiny import OPTIONS, Block, net, noise, relative_error

X = noise(2, 8)
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def long(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Enough calls for a region."""
    for number in range(1, 14):
        x = torch.sin(x) / number + y
    return x


class Repeating(nn.Module):
    """What ``steps`` do to a tensor, one after the other, each with a weight of its own."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(8)) for _ in steps)
        self.steps = steps
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(x)
        for step, weight in zip(self.steps, self.weights, strict=True):
            x = torch.tanh(step(x, weight))
        return F.gelu(x)


def regions(probe: GraphProbe) -> list[int]:
    """How often each region is called, in the order of the graph."""
    names = [str(node.args[1]) for node in probe.nodes(dynamo_interface.invoke_subgraph)]
    return [names.count(name) for name in dict.fromkeys(names)]


def other_wiring(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same calls as ``long``, of which the last reads what came first."""
    first = x
    for number in range(1, 14):
        x = torch.sin(x) / number + (y if number < 13 else first)
    return x


def scaled(by: float) -> Step:
    return lambda x, y: long(x, y) + long(x * by, y)


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([long] * 3, [3]),
        ([long, lambda x, y: x.cos(), long, lambda x, y: x.exp(), long], [3]),
        ([long, long, lambda x, y: x.sigmoid(), other_wiring, other_wiring, other_wiring], None),
        ([lambda x, y: long(x, x), lambda x, y: long(x, y), lambda x, y: long(x, x)], None),
        ([scaled(2.0), scaled(3.0)], None),
    ],
    ids=["at once", "apart", "other wiring", "one input twice", "other constants"],
)
def test_what_is_repeated_becomes_a_region(steps: Sequence[Step], found: list[int] | None) -> None:
    module = Repeating(steps)
    probe = GraphProbe(module, X, regional_compilation=True)
    probe.run(outline_regions)
    assert regions(probe) and (found is None or regions(probe) == found)
    assert sum(probe.after.counts.values()) < sum(probe.before.counts.values())
    (result,) = probe.call()
    assert torch.equal(result, module(X))
    probe.assert_settled(outline_regions)


class Halving(nn.Module):
    """What is repeated begins with taking two tensors out of a tuple, and ends with making one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(8)) for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = torch.split(x, 4, dim=-1)
        for weight in self.weights:
            left, right = torch.chunk(long(torch.cat([right, left], dim=-1), weight), 2, dim=-1)
        return torch.cat([left, right], dim=-1)


def test_only_tensors_cross_a_border() -> None:
    module = Halving()
    probe = GraphProbe(module, X, regional_compilation=True)
    probe.run(outline_regions)
    assert regions(probe) == [4]
    for call in probe.nodes(dynamo_interface.invoke_subgraph):
        assert all(isinstance(fx_utils.example(node), torch.Tensor) for node in call.all_input_nodes[1:])
        assert all(isinstance(fx_utils.example(user), torch.Tensor) for user in call.users)
    (result,) = probe.call()
    assert torch.equal(result, module(X))


@pytest.mark.parametrize("place", [0, 15])
def test_no_tuple_crosses_a_border(place: int) -> None:
    """``place``: of what takes a tensor out of a tuple that was made before all of them."""
    traced = fx.Graph()
    x = traced.placeholder("x")
    pair = traced.call_function(torch.chunk, (x, 2))
    y = traced.call_function(torch.cat, ([x, x],))
    for _ in range(3):
        for number in range(30):
            half = traced.call_function(operator.getitem, (pair, 0)) if number == place else None
            y = traced.call_function(torch.sin, (y,)) if half is None else traced.call_function(torch.add, (half, y))
    traced.output((y,))
    graph_module = fx.GraphModule({}, traced)
    context = GraphProbe(Repeating([long]), X, regional_compilation=True).context
    assert outline_regions(graph_module, context)
    inputs = [node.all_input_nodes[1:] for node in traced.nodes if node.target is dynamo_interface.invoke_subgraph]
    assert pair not in {node for nodes in inputs for node in nodes}


def test_values_that_are_read_far_behind_their_region() -> None:
    """As skip connections are: what a region makes in the middle counts for all of its calls."""

    class Skipping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = []
            for _ in range(3):
                half = long(x, x)
                x = long(half, x)
                kept.append(half)
            return x + kept[1]

    module = Skipping()
    probe = GraphProbe(module, X, regional_compilation=True)
    assert probe.run(outline_regions)["outline_regions"] >= 1
    (result,) = probe.call()
    assert torch.equal(result, module(X))


def views(x: torch.Tensor) -> torch.Tensor:
    """Regions of whose results two are parts of one tensor, and one is another's view."""
    for close in (torch.sin, torch.tanh, torch.cos):
        first, second = long(x, x).chunk(2, -1)
        turned = second.t()
        x = torch.cat([close(second) + turned.sum(), first], -1)
    return x


@pytest.mark.filterwarnings("ignore")
def test_results_that_are_views_with_inductor() -> None:
    """Inductor counts the offset of what a subgraph returns twice."""
    probe = GraphProbe(views, X, regional_compilation=True)
    assert probe.run(outline_regions)["outline_regions"] >= 1
    region = probe.graph_module.region_0
    assert any(node.target == "clone" for node in region.graph.nodes)
    with torch.no_grad():
        args = list(probe.inputs.values())
        (result,) = inductor_interface.compile_fx(probe.graph_module, args, {}, outside_dynamo=True)(*args)
    assert relative_error(result, views(X)) < 1e-5


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(block(x))
        return x


def test_8_bit_layers_get_their_own_weights_and_scales() -> None:
    module, x = Blocks(), noise(1, 16, 8, 8)
    probe = GraphProbe(module, x, regional_compilation=True).analyze()
    layers = probe.observe()
    *others, last = REWRITE
    probe.run(*others)
    (expected,) = probe.call_quantized(layers)
    assert probe.run(last) == {"outline_regions": 1}
    assert regions(probe)[0] >= 5
    (result,) = probe.call_quantized(layers)
    assert relative_error(result, expected) < 1e-6


@pytest.mark.parametrize(
    "steps",
    [
        [lambda x, y: x.cos() + y] * 3,
        [long],
        [long, lambda x, y: long(x[:, :4], y[:4]).repeat(1, 2)],
        [long, lambda x, y: long(x.double(), y.double()).float()],
        [lambda x, y: operator.iadd(long(x, y), y)] * 3,
    ],
    ids=["few calls", "once", "other shapes", "other dtypes", "in place"],
)
def test_what_differs_or_is_short_is_left_alone(steps: Sequence[Step]) -> None:
    probe = GraphProbe(Repeating(steps), X, regional_compilation=True)
    assert probe.run(outline_regions) == {"outline_regions": 0}


def test_results_in_one_memory_are_left_alone() -> None:
    model = Repeating([long] * 3)

    def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = model(x)
        return y, y[0]

    probe = GraphProbe(twice, X, regional_compilation=True)
    assert probe.run(outline_regions) == {"outline_regions": 0}


def test_symbolic_sizes_are_left_alone() -> None:
    probe = GraphProbe(Repeating([long] * 3), X, dynamic=True, regional_compilation=True)
    assert probe.run(outline_regions) == {"outline_regions": 0}


@pytest.mark.parametrize(
    ("option", "device", "found"),
    [("auto", "cpu", True), ("auto", "cuda", False), (False, "cpu", False), (True, "cuda", True)],
)
def test_by_default_cpus_have_regions(option: str | bool, device: str, found: bool) -> None:
    probe = GraphProbe(Repeating([long] * 3), X, regional_compilation=option)
    probe.context.device = torch.device(device)
    assert bool(probe.run(outline_regions)["outline_regions"]) == found


def test_small_models_have_none() -> None:
    probe = GraphProbe(net(), noise(1, 4, 8, 8), regional_compilation=True).analyze()
    assert probe.run(*REWRITE)["outline_regions"] == 0


@torch.no_grad()
@pytest.mark.parametrize("by", [1.5, float("nan")])
def test_what_inductor_gets_wrong_is_compiled_as_a_whole(
    by: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = []

    def compile_fx(module: fx.GraphModule, *_: object, **__: object) -> Callable[..., Any]:
        in_regions = hasattr(module, "region_0")
        compiled.append(in_regions)
        return lambda *args: [result * by for result in module(*args)] if in_regions else module(*args)

    monkeypatch.setattr(inductor_interface, "compile_fx", compile_fx)
    caplog.set_level(logging.INFO, "onlinequant")
    module, x = Blocks(), noise(1, 16, 8, 8)
    step = torch.compile(module, backend=oq.onlinequant, options={**OPTIONS, "regional_compilation": True})
    for _ in range(3):
        result = step(x)
    assert compiled == [True, False]
    assert relative_error(result, module(x)) < CLOSE
    assert oq.reports()[-1].phase == "quantized"
    assert "compiling as a whole" in caplog.text and "differs by" in caplog.text
    assert not notes()


def notes() -> list[Path]:
    """What was found right."""
    return list(cache_directory().glob("inductor/*/agrees-*"))


@torch.no_grad()
def test_what_inductor_gets_right_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = list[str]()
    op_by_op = 0

    def compile_fx(module: fx.GraphModule, *_: object, **__: object) -> Callable[..., Any]:
        compiled.append("in regions" if hasattr(module, "region_0") else "as a whole")
        return module

    def counting(*values: torch.Tensor) -> float:
        nonlocal op_by_op
        op_by_op += 1
        return relative_error(*values)

    monkeypatch.setattr(inductor_interface, "compile_fx", compile_fx)
    monkeypatch.setattr(region_check, "relative_error", counting)
    module = Blocks()
    for number, size in enumerate((8, 8, 4)):
        forget_everything()
        x = noise(1, 16, size, size)
        step = torch.compile(module, backend=oq.onlinequant, options={**OPTIONS, "regional_compilation": True})
        for _ in range(3):
            step(x)
        assert len(compiled) == number + 1 and compiled[-1] == "in regions"
        assert (len(notes()), op_by_op) == [(1, 2), (1, 2), (2, 4)][number]


@torch.no_grad()
def test_without_a_result_there_is_nothing_to_compare(tmp_path: Path) -> None:
    nothing = fx.symbolic_trace(lambda x: (x * 0, x.argmax(), x / 0))
    region_check.Reference(nothing, [X], {}, tmp_path).check(lambda x: [x, x, x])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [lambda x: [x, x], lambda x: [x, -x / 100], lambda x: [0 * x, x / 100]])
def test_every_output_counts_by_itself(tmp_path: Path, wrong: Callable[..., Any]) -> None:
    reference = region_check.Reference(fx.symbolic_trace(lambda x: (x, x / 100)), [X], {}, tmp_path)
    with pytest.raises(RuntimeError, match="the compiled result differs by"):
        reference.check(wrong)
    assert not list(tmp_path.iterdir())
    reference.check(lambda x: [1.05 * x, x / 100])
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_found_right_with_other_options_is_compared_again(tmp_path: Path) -> None:
    graph_module = fx.symbolic_trace(lambda x: (x,))
    region_check.Reference(graph_module, [X], {}, tmp_path).check(lambda x: [x])
    region_check.Reference(graph_module, [X], {}, tmp_path).check(lambda x: [-x])  # is not looked at any more
    with pytest.raises(RuntimeError, match="differs by 2 from"):
        region_check.Reference(graph_module, [X], {"max_autotune": True}, tmp_path).check(lambda x: [-x])


def test_the_reference_is_no_part_of_what_is_compiled(tmp_path: Path) -> None:
    probe = GraphProbe(Repeating([long] * 3), X, regional_compilation=True)
    probe.run(outline_regions)
    args = list(probe.inputs.values())
    reference = region_check.Reference(probe.graph_module, args, {}, tmp_path)
    expected = probe.graph_module(*args)
    for node in probe.graph_module.region_0.graph.nodes:
        if node.target is operator.add:
            node.target = operator.sub
    probe.graph_module.region_0.recompile()
    with pytest.raises(RuntimeError, match="differ"):
        reference.check(probe.graph_module)
    reference.check(lambda *_: expected)


class Strided(nn.Module):
    """The same calls on a contiguous tensor and, in 8 bit only, on one that is channels_last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = long(F.silu(x), x.sigmoid())
        x = self.conv(x)
        return F.gelu(long(F.silu(x), x.sigmoid()))


def strides_of_regions(module: fx.GraphModule, args: Sequence[Any]) -> dict[str, set[tuple[int, ...]]]:
    """Of the tensors of four dimensions that each region receives."""
    found: dict[str, set[tuple[int, ...]]] = {}

    class Run(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is dynamo_interface.invoke_subgraph:
                found.setdefault(args[1], set()).update(x.stride() for x in args[2:] if x.dim() == 4)
            return super().call_function(target, args, kwargs)

    with next(arg.fake_mode for arg in args if isinstance(arg, FakeTensor)):
        Run(module).run(*args)
    return found


@torch.no_grad()
def test_regions_are_alike_in_the_strides_that_they_have_in_8_bit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Inductor refuses others, and then compiling the whole graph takes minutes longer."""
    compiled = []

    def compile_fx(module: fx.GraphModule, inputs: Sequence[Any], *_: object, **__: object) -> Callable[..., Any]:
        strides = strides_of_regions(module, inputs)
        compiled.append(max(map(len, strides.values()), default=0))
        if compiled[-1] > 1:
            raise AssertionError("subgraph args must have consistent values!")
        return module

    monkeypatch.setattr(inductor_interface, "compile_fx", compile_fx)
    caplog.set_level(logging.INFO, "onlinequant")
    module, x = Strided(), noise(1, 8, 6, 6)
    step = torch.compile(module, backend=oq.onlinequant, options={**OPTIONS, "regional_compilation": True})
    for _ in range(3):
        result = step(x)
    assert compiled == [2, 0]
    assert relative_error(result, module(x)) < CLOSE
    assert "compiling in other regions" in caplog.text and "as a whole" not in caplog.text
    forget_everything()
    module(x)
    step = torch.compile(Strided(), backend=oq.onlinequant, options={**OPTIONS, "regional_compilation": True})
    step(x)
    assert compiled == [2, 0, 0]  # what has failed is not tried again
