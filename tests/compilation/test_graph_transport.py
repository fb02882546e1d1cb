"""Graphs as bytes: what comes out is what went in, as far as Inductor looks at it."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from onlinequant_backend import ops
from onlinequant_backend.compilation import graph_transport, symbolic_inputs
from onlinequant_backend.graph import fx_utils
from onlinequant_backend.passes import REWRITE
from onlinequant_backend.torch_internals import dynamo_interface
from tests.helpers.graph_probe import GraphProbe, capture
from tests.helpers.small import X, small
from tests.helpers.tiny import Block, noise


def through(module: fx.GraphModule) -> fx.GraphModule:
    """What another process gets."""
    return graph_transport.loads(graph_transport.dumps(module), FakeTensorMode(), {})


def parts(module: fx.GraphModule) -> list[fx.GraphModule]:
    """It and its regions."""
    return [part for _, part in sorted(module.named_modules()) if isinstance(part, fx.GraphModule)]


def all_of(module: fx.GraphModule) -> Any:
    """What AOTAutograd and Inductor read of a module, regions included, but for the values of constants."""
    nodes = [
        (node.op, node.name, str(node.target), str(node.args), str(node.kwargs), node.type, _meta(node), _source(node))
        for node in module.graph.nodes
    ]
    inner = {name: all_of(child) for name, child in module.named_children() if isinstance(child, fx.GraphModule)}
    return module.code, nodes, inner, getattr(module, "_param_name_to_source", None)


def _meta(node: fx.Node) -> Any:
    return "example_value" in node.meta, node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")


def _source(node: fx.Node) -> Any:
    return getattr(node, "_dynamo_source", None)


def rewritten(regional: bool = False) -> GraphProbe:
    """A graph in 8 bit: convolutions, method calls and operators of ours; in regions if asked."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(6)]
    model = nn.Sequential(*(block for block in blocks for _ in range(2))).requires_grad_(False)
    probe = GraphProbe(model, noise(1, 16, 8, 8), regional_compilation=regional).analyze()
    probe.observe()
    probe.run(*REWRITE)
    return probe


@pytest.mark.parametrize("regional", [False, True])
def test_a_rewritten_graph_arrives_as_it_is(regional: bool) -> None:
    probe = rewritten(regional)
    module = probe.graph_module
    targets = {node.target for part in parts(module) for node in part.graph.nodes}
    assert {ops.conv, ops.linear, "flatten", "transpose"} <= targets
    assert (dynamo_interface.invoke_subgraph in targets) == regional == (len(parts(module)) > 1)
    standard = graph_transport.standard(module)
    assert not set(parts(standard)) & set(parts(module))  # Inductor changes what it is given, regions included
    arrived = through(standard)
    assert all_of(arrived) == all_of(standard)
    for before, after in zip(parts(module), parts(arrived), strict=True):
        assert after.code == before.code and str(after.graph) == str(before.graph)
        assert [node.target for node in after.graph.nodes] == [node.target for node in before.graph.nodes]
        assert "example_value" in {key for node in after.graph.nodes for key in node.meta}
        after.graph.lint()


@torch.no_grad()
def test_it_computes_the_same() -> None:
    model = small()
    module, args = capture(model, X)
    assert torch.equal(through(module)(*args)[0], model(X))


def test_where_inputs_come_from_arrives() -> None:
    """AOTAutograd reads it, and without it takes parameters for tensors that may be elsewhere in the next call."""
    module, _ = capture(small(), X)
    arrived = through(graph_transport.standard(module))
    assert arrived._param_name_to_source == module._param_name_to_source != {}
    assert all(_source(node) is not None for node in fx_utils.placeholders(arrived))
    assert {_meta(node)[1] for node in fx_utils.placeholders(arrived)} >= {"unguarded"}
    assert all_of(arrived) == all_of(graph_transport.standard(module))


def test_operators_arrive_as_themselves() -> None:
    given = [
        torch.ops.aten.add.Tensor,
        torch.ops.aten.add,
        dynamo_interface.invoke_subgraph,
        F.silu,
        torch.conv2d,
        torch.Tensor.add,
    ]
    arrived = graph_transport.loads(graph_transport.dumps(given), FakeTensorMode(), {})
    assert all(one is other for one, other in zip(given, arrived, strict=True))


def with_constant(value: Any, target: Callable[..., Any] = torch.add) -> fx.GraphModule:
    graph_ = fx.Graph()
    x, constant = graph_.placeholder("x"), graph_.get_attr("constant")
    graph_.output(graph_.call_function(target, (x, constant)))
    return fx.GraphModule({"constant": value}, graph_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_constant_arrives_with_its_values(dtype: torch.dtype) -> None:
    constant = torch.tensor([[1, 0, 3], [0, 5, 1]]).to(dtype)
    arrived: Any = through(with_constant(constant)).constant
    assert not isinstance(arrived, FakeTensor)
    assert arrived.dtype == dtype and torch.equal(arrived, constant)


class OfThisProcess:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("it cannot leave this process")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_constant(torch.zeros(5000)), "constant is a Tensor"),
        (lambda: with_constant(nn.Linear(2, 2)), "constant is a Linear"),
        (lambda: with_constant(torch.zeros(2), target=lambda x, y: x), "lambda"),
        (OfThisProcess, "it cannot leave"),
    ],
    ids=["a large constant", "a module", "a function without a name", "an object"],
)
def test_what_cannot_travel(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(graph_transport.NotPortableError, match=reason):
        graph_transport.dumps(make())


def test_what_another_trace_of_the_model_gives_is_the_same() -> None:
    """The keys of Inductor's caches are made from it, and Dynamo's own graph holds what is this process's alone."""
    texts = set()
    for _ in range(2):
        module, _ = capture(small(), X)
        module.meta["onlinequant"] = object()
        for node in module.graph.nodes:
            node.meta["onlinequant"] = object()
        standard = graph_transport.standard(module)
        texts.add(str(all_of(standard)))
        assert "onlinequant" not in standard.meta
        assert not any({"onlinequant", "stack_trace"} & node.meta.keys() for node in standard.graph.nodes)
        assert all_of(graph_transport.standard(standard)) == all_of(standard)
        torch._dynamo.reset()
    assert len(texts) == 1


class InParts(nn.Module):
    """A network of which one value is a tuple of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.inner(x).chunk(2, dim=1)
        return first * second


@pytest.mark.parametrize("make", [small, InParts])
def test_symbolic_sizes_arrive(make: Callable[[], nn.Module]) -> None:
    module, _ = capture(make(), noise(2, 4, 12, 8), dynamic=True)
    sizes = {"s": 2, "h": 12, "w": 8}
    values = [node.meta["example_value"] for node in fx_utils.placeholders(module)]
    hints = [dynamo_interface.hint(value) if isinstance(value, torch.SymInt) else value for value in values]
    made = symbolic_inputs.SymbolicInputs(module, hints)
    assert len(made.symbols) == len(sizes)

    shape_env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shape_env)
    data = graph_transport.dumps((graph_transport.standard(module), made.values))
    arrived, inputs = graph_transport.loads(data, mode, symbolic_inputs.symbolic_sizes(shape_env, made.symbols))
    assert all_of(arrived) == all_of(graph_transport.standard(module))
    assert [_kind(value) for value in inputs] == [_kind(value) for value in made.values]
    symbols = [value for value in inputs if isinstance(value, torch.SymInt)]
    assert len(symbols) == len(sizes) and all(value.node.shape_env is shape_env for value in symbols)
    assert {value.node.hint for value in symbols} == set(sizes.values())
    # They are as free as they were: a product of two is still one.
    product = symbols[0] * symbols[1] + 1
    assert str(
        graph_transport.loads(
            graph_transport.dumps(product), mode, symbolic_inputs.symbolic_sizes(shape_env, ()) | _named(symbols)
        )
    ) == str(product)


def _named(sizes: list[torch.SymInt]) -> dict[str, torch.SymInt]:
    return {str(size): size for size in sizes}


def _kind(value: Any) -> str:
    return str(graph_transport.kind(value) if isinstance(value, torch.Tensor) else value)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "tensor",
    [
        noise(3, 4),
        noise(4, 3).t(),
        noise(2, 6, 8)[1:, 2:4, ::2],
        torch.ones(2).expand(3, 2),
        torch.zeros(0, 4)[:, 1:],
        noise(8).to(torch.bfloat16)[3:].data,
        torch.tensor(2),
        nn.Parameter(noise(6, 4)[2:], requires_grad=False),
    ],
    ids=["plain", "turned", "part", "expanded", "empty", "bfloat16", "number", "parameter"],
)
def test_a_stand_in_is_of_the_same_kind(tensor: torch.Tensor, mode: Callable[[], Any]) -> None:
    fake_mode = FakeTensorMode()
    with mode():
        (made,) = graph_transport.fake_tensors(fake_mode, [tensor])
        arrived = graph_transport.loads(graph_transport.dumps(tensor), fake_mode, {})
    for one in (made, arrived):
        assert isinstance(one, FakeTensor) and one.fake_mode is fake_mode
        assert graph_transport.kind(one) == graph_transport.kind(tensor)
        assert not one.is_inference() and not one.requires_grad


@torch.inference_mode()
@pytest.mark.parametrize("dynamic", [False, True])
def test_inputs_of_inference_mode_have_ordinary_stand_ins(dynamic: bool) -> None:
    """The other process has no inference mode, and the keys of AOTAutograd's cache know the difference."""
    model, x = small(), noise(2, 4, 12, 8) * 1
    assert x.is_inference()
    module, args = capture(model, x, dynamic=dynamic)
    made: Any = symbolic_inputs.SymbolicInputs(module, args) if dynamic else symbolic_inputs.FixedInputs(args)
    tensors = [value for value in made.values if isinstance(value, torch.Tensor)]
    assert tensors and not any(value.is_inference() for value in tensors)


def test_a_tensor_that_is_given_twice_stays_one() -> None:
    x = noise(2, 3)
    first, second, other = symbolic_inputs.FixedInputs([x, x, noise(2, 3)]).values
    assert first is second is not other


@dataclasses.dataclass
class Named:
    """Something with a tensor in it."""

    tensor: torch.Tensor


def test_values_of_tensors_stay_behind() -> None:
    data = graph_transport.dumps(Named(torch.full((1000, 1000), 7.0)))
    assert len(data) < 2000
    assert isinstance(graph_transport.loads(data, FakeTensorMode(), {}).tensor, FakeTensor)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last, torch.preserve_format])
def test_memory_formats_are_looked_for_in_torch_alone(memory_format: torch.memory_format) -> None:
    """Pickle finds them in this module too, which other processes do not have."""
    data = pickle.dumps(memory_format)
    assert pickle.loads(data) is memory_format
    assert b"tests" not in data and b"torch._" not in data
