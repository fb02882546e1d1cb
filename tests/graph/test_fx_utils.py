from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from onlinequant_backend.config import QuantConfig
from onlinequant_backend.graph import fx_utils, layer_nodes, parameter_names, specialization
from onlinequant_backend.passes import ANALYZE, OBSERVE, REWRITE, PassContext, run_passes
from tests.helpers.graph_probe import EIGHT_BITS, EVERY_LAYER, GraphProbe, Snapshot, WithWeight, capture
from tests.helpers.tiny import net, noise

X = noise(1, 4, 8, 8)
LINEAR = torch._C._nn.linear


def scaled(x: torch.Tensor, count: int, factor: float) -> torch.Tensor:
    """Shapes and values that depend on numbers; ``factor`` is read twice."""
    return x.repeat(count, 1) * factor + torch.ones(count * x.shape[0], 1).clamp(max=factor)


@torch.library.custom_op("onlinequant_tests::count", mutates_args=("counter",))
def count(counter: torch.Tensor) -> None:
    counter.add_(1)


def calls(function: Callable[..., Any], *inputs: torch.Tensor) -> list[fx.Node]:
    graph_module, _ = capture(function, *inputs)
    return [node for node in graph_module.graph.nodes if node.op.startswith("call_")]


def floor_divided(x: torch.Tensor) -> torch.Tensor:
    x //= 2
    return x


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (lambda x: count(x) or x + 1, True),
        (lambda x: torch.ops.aten.add_.Tensor(x, x), True),
        (lambda x: torch.ops.aten.add.Tensor(x, x), False),
        (floor_divided, True),
        (lambda x: x.__iadd__(1), True),
        (lambda x: torch.ops.aten.add_(x, 1), True),
        (lambda x: torch.ops.aten.add(x, 1), False),
        (lambda x: torch.ops.onlinequant_tests.count(x) or x + 1, True),
        (lambda x: F.embedding(torch.tensor([0]), x, max_norm=0.1), True),
        (lambda x: F.embedding(torch.tensor([0]), x), False),
        (lambda x: torch.cond(x.sum() > 0, lambda y: y.clone().add_(1), lambda y: y + 0, (x,)), True),
        (lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y + 0, (x,)), False),
        (lambda x: F.batch_norm(x, x.mean(0), x.var(0), training=True), True),
        (lambda x: F.batch_norm(x, x.mean(0), x.var(0)), False),
        (lambda x: F.instance_norm(x[None], x.mean(1), x.var(1)), True),
        (lambda x: F.relu(x, inplace=True), True),
        (lambda x: F.relu(x), False),
    ],
)
def test_what_writes_in_place(function: Callable[..., Any], writes: bool) -> None:
    assert any(map(fx_utils.writes_in_place, calls(function, noise(4, 8)))) == writes


@pytest.mark.parametrize(
    ("function", "is_random"),
    [
        (lambda x: x + torch.randn_like(x), True),
        (lambda x: x.clone().normal_(), True),
        (lambda x: F.dropout(x), True),
        (lambda x: F.dropout(x, 0.1, False), False),
        (lambda x: torch.ops.aten.bernoulli.default(x.sigmoid()), True),
        (lambda x: F.normalize(x) + x.norm(), False),
    ],
)
def test_what_is_random(function: Callable[..., Any], is_random: bool) -> None:
    assert any(map(fx_utils.is_random, calls(function, noise(4, 8)))) == is_random


def test_copy_leaves_dynamo_s_graph_alone() -> None:
    model = net()
    original, args = capture(model, X)
    before = Snapshot.of(original)
    metas = {node.name: set(node.meta) for node in original.graph.nodes}
    copy = fx_utils.copy_graph(original)
    assert Snapshot.of(copy) == before
    run_passes(copy, (*ANALYZE, *OBSERVE, *REWRITE), PassContext(QuantConfig(**EVERY_LAYER), EIGHT_BITS))
    assert Snapshot.of(copy) != before

    assert Snapshot.of(original) == before
    assert {node.name: set(node.meta) for node in original.graph.nodes} == metas
    assert list(layer_nodes(original)) == []
    with torch.no_grad():
        assert torch.equal(original(*args)[0], model(X))


def test_copy_keeps_what_dynamo_knows() -> None:
    original, args = capture(net(), X)
    original.meta["note"] = "kept"
    copy = fx_utils.copy_graph(fx_utils.copy_graph(original))
    assert copy.meta["note"] == "kept"
    names = [list(parameter_names.parameter_names(module).values()) for module in (original, copy)]
    assert names[0] == names[1]
    assert sorted(names[1]) == sorted(name for name, _ in net().named_parameters())
    with torch.no_grad():
        assert torch.equal(copy(*args)[0], original(*args)[0])


def test_only_parameters_have_names() -> None:
    probe = GraphProbe(WithWeight(F.linear, 4, 4), noise(2, 4))
    assert list(parameter_names.parameter_names(probe.graph_module).values()) == ["weight"]
    assert not fx_utils.is_parameter(probe.nodes(LINEAR)[0])


def linear() -> nn.Linear:
    return nn.Linear(4, 4, bias=False)


BASE = linear()


def closure() -> Callable[..., Any]:
    first, second = linear(), linear()
    return lambda x: second(first(x))


@pytest.mark.parametrize(
    ("function", "models", "names"),
    [
        (lambda base, refiner, x: refiner(base(x)), (linear(), linear()), ["base.weight", "refiner.weight"]),
        (lambda base, x: base(x), (nn.Sequential(linear(), linear()),), ["0.weight", "1.weight"]),
        (lambda model, x: BASE(model[1](x)), (nn.Sequential(linear(), linear()),), ["model.1.weight", "BASE.weight"]),
        (lambda models, x: models[1](models[0](x)), ([linear(), linear()],), ["0.weight", "1.weight"]),
        (closure(), (), ["first.weight", "second.weight"]),
        (lambda forward, x: forward(x), (linear().forward,), ["weight"]),
        (lambda v, w, x: F.linear(F.linear(x, v), w), (linear().weight, linear().weight), ["l_v_", "l_w_"]),
    ],
)
def test_no_two_parameters_have_one_name(
    function: Callable[..., Any], models: tuple[Any, ...], names: list[str]
) -> None:
    traced, _ = capture(function, *models, noise(2, 4))
    assert sorted(parameter_names.parameter_names(traced).values()) == sorted(names)
    assert not fx_utils.is_parameter(None)


@pytest.mark.parametrize(("count", "factor"), [(3, 0.5), (2, -1.0)])
def test_specialize_bakes_numbers_in(count: int, factor: float) -> None:
    x = noise(5, 7)
    original, args = capture(scaled, x, count, factor, dynamic=True)
    symbolic = fx_utils.copy_graph(original)
    inputs = fx_utils.placeholders(symbolic)
    assert any(isinstance(arg, int) for arg in args)
    assert sum(map(specialization.is_wrapped_float, inputs)) == 1

    specialization.specialize(symbolic, args)
    symbolic.graph.lint()
    symbolic.recompile()
    # Only the tensor is read any more.
    assert [arg is x for node, arg in zip(inputs, args, strict=True) if node.users] == [True]
    assert "item" not in Snapshot.of(symbolic).counts
    assert torch.equal(symbolic(*(arg if arg is x else None for arg in args))[0], scaled(x, count, factor))
    assert "item" in Snapshot.of(original).counts


@pytest.mark.parametrize(
    ("function", "x", "stays"),
    [
        (lambda x, s: x * s, X, True),
        (lambda x, s: x * (s * 2) - s, X.bfloat16(), True),
        (lambda x, s: x * s, X.int(), False),  # float32; times a float64 tensor it would be float64
        (lambda x, s: x.sum() * s, X, False),  # the same
        (lambda x, s: x * torch.tensor([s * 1000], dtype=x.dtype, device=x.device) / -s, X, True),
        (lambda x, s: x * torch.tensor(s).sin(), X, True),
        (lambda x, s: x.new_full((2, 1), s) + torch.full((2, 3), s, dtype=torch.float16), X.half(), True),
        (lambda x, s: torch.full_like(x, s), X.bfloat16(), True),
        (lambda x, s: x * torch.full((), s), X, False),
        (lambda x, s: x * torch.tensor([s, 1.0])[0], X, False),
        (lambda x, s: x * torch.full((1,), s, dtype=torch.int32), X, False),
        (lambda x, s: (x * s, x.clamp(max=s)), X, False),
    ],
)
def test_a_float_that_is_only_calculated_with_stays_an_input(
    function: Callable[[torch.Tensor, float], Any], x: torch.Tensor, stays: bool
) -> None:
    captured, args = capture(function, x, 0.3, dynamic=True)
    for number in (0.3, 0.7):
        specialized = fx_utils.copy_graph(captured)
        (node,) = filter(specialization.is_wrapped_float, fx_utils.placeholders(specialized))
        assert specialization.is_open_float(node) == stays
        values = [
            torch.tensor(number, dtype=torch.float64) if arg is not x and torch.is_tensor(arg) else arg for arg in args
        ]
        specialization.specialize(specialized, values)
        specialized.recompile()
        assert bool(node.users) == stays
        expected = function(x, number)
        expected = expected if isinstance(expected, tuple) else (expected,)
        torch.testing.assert_close(specialized(*values), expected)


def test_scalar_tensor_is_no_wrapped_float() -> None:
    original, args = capture(lambda x, t: x * t, noise(3), torch.tensor(2.0, dtype=torch.float64), dynamic=True)
    copy = fx_utils.copy_graph(original)
    assert not any(map(specialization.is_wrapped_float, fx_utils.placeholders(copy)))
    specialization.specialize(copy, args)
    assert Snapshot.of(copy) == Snapshot.of(original)


def test_added_placeholders_come_last() -> None:
    probe = GraphProbe(nn.Linear(4, 4), noise(2, 4))
    names = [node.name for node in fx_utils.placeholders(probe.graph_module)]
    example = torch.ones(3)
    first = fx_utils.add_placeholder(probe.graph_module, "onlinequant_first", example)
    second = fx_utils.add_placeholder(probe.graph_module, "onlinequant_second")
    probe.run()
    assert fx_utils.placeholders(probe.graph_module)[len(names) :] == [first, second]
    assert fx_utils.example(first) is example
    assert not fx_utils.is_parameter(first)
    assert torch.equal(probe.call(example, example)[0], probe.call(None, None)[0])


def call(args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
    return fx.Graph().call_function(F.linear, args, kwargs)


@pytest.mark.parametrize(
    ("node", "value"),
    [
        (call((1, 2, 3)), 3),
        (call((1, 2), bias=3), 3),
        (call((), input=1, weight=2, bias=None), None),
        (call((1, 2)), "default"),
    ],
)
def test_argument_is_found_wherever_it_was_given(node: fx.Node, value: object) -> None:
    assert fx_utils.argument(node, 2, "bias", "default") == value


def test_replaced_call_hands_its_metadata_on() -> None:
    probe = GraphProbe(WithWeight(lambda x, w: x @ w + 1, 4, 4), noise(2, 4))
    (node,) = probe.nodes(operator.matmul)
    meta = dict(node.meta)
    new = fx_utils.replace_call(probe.graph_module, node, operator.add, node.args)
    probe.run()
    assert (probe.after.counts[operator.matmul], probe.after.counts[operator.add]) == (0, 2)
    assert new.meta == meta
    assert next(iter(new.users)).args == (new, 1)


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (lambda x: torch.clone(x) + 1, False),
        (lambda x: x.__add__(1), False),
        (lambda x: F.leaky_relu(x, 0.2, False), False),
        (lambda x: F.silu(x, inplace=False), False),
        (lambda x: x.clone().add_(1), True),
        (lambda x: torch.relu_(x.clone()), True),
        (lambda x: torch.sin(x, out=torch.empty_like(x)), True),
        (lambda x: F.silu(x.clone(), inplace=True), True),
        (lambda x: F.leaky_relu(x.clone(), 0.2, True), True),
        *((lambda x, op=op: op(x * 1, 2), True) for op in (operator.iadd, operator.imul, operator.isub)),
    ],
)
def test_writes_in_place(function: Any, writes: bool) -> None:
    probe = GraphProbe(function, noise(3))
    assert any(map(fx_utils.writes_in_place, probe.graph_module.graph.nodes)) is writes
