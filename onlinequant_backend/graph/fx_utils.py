"""Handling Dynamo's FX graphs: copy one, name its inputs, add inputs, make one concrete."""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ..torch_internals import dynamo_interface

_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        *("setitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)

# Names of random functions and methods, and of their in-place variants.
_RANDOM = re.compile(
    r"(rand|randn|randint|randperm|normal|bernoulli|multinomial|poisson|uniform|exponential|cauchy|geometric|log_normal"
    r"|random|rrelu|gumbel_softmax|(feature_)?(alpha_)?dropout[123]?d?)(_like)?_?"
)
_IN_PLACE_METHODS = frozenset(f"__{function.__name__}__" for function in _IN_PLACE_OPERATORS)


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that may be changed: Dynamo still reads its own graph after the backend has returned."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, copies))
    copy = dynamo_interface.graph_module(graph_module, graph)
    copy.meta = dict(graph_module.meta)
    for attribute in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(graph_module, attribute):
            setattr(copy, attribute, getattr(graph_module, attribute))
    for original, node in copies.items():
        node.meta.pop("grapharg", None)  # it references the user's tensor, which Dynamo soon releases
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    return copy


def values(graph_module: fx.GraphModule, inputs: Sequence[Any], fake_mode: FakeTensorMode) -> dict[fx.Node, Any]:
    """What each node returns, as fake tensors, for fake ``inputs``."""
    interpreter = _Recorder(graph_module, fake_mode)
    with fake_mode, torch.no_grad():
        interpreter.run(*inputs)
    return interpreter.values


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
        super().__init__(graph_module)
        self.values: dict[fx.Node, Any] = {}
        self._fake_mode = fake_mode

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, torch.Tensor):
            value = self._fake_mode.from_tensor(value)
        self.values[n] = value
        return value


def requires_grad(value: Any) -> bool:
    """Whether an argument of a graph is a tensor that needs a gradient."""
    return isinstance(value, torch.Tensor) and value.requires_grad


def is_concrete(value: Any) -> bool:
    """Whether a traced value, such as a tensor or a tuple of tensors, neither has a symbolic size nor is one."""
    numbers: list[Any] = []
    for leaf in tree_leaves(value):
        is_tensor = isinstance(leaf, torch.Tensor)
        numbers += (*leaf.shape, *leaf.stride(), leaf.storage_offset()) if is_tensor else (leaf,)
    return not any(isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)) for number in numbers)


def unsupported_reason(graph_module: fx.GraphModule) -> str | None:
    """Why a graph holds tensors that the passes and layers do not support, or None. The sizes and storages of such
    tensors cannot be queried.
    """
    for node in graph_module.graph.nodes:
        for value in tree_leaves(node.meta.get("example_value")):
            if not isinstance(value, torch.Tensor):
                continue
            if torch._C._functorch.is_functorch_wrapped_tensor(value):
                return "it holds a transform of torch.func, such as vmap or grad, which 8-bit layers do not support"
            if value.layout is not torch.strided:
                return f"it holds nested or sparse tensors ({value.layout}), which 8-bit layers do not support"
    return None


def placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The graph's inputs in call order."""
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


def is_parameter(node: Any) -> bool:
    """Whether ``node`` is an input of the graph that holds a module's parameter."""
    return (
        isinstance(node, fx.Node)
        and node.op == "placeholder"
        and isinstance(node.meta.get("example_value"), torch.nn.Parameter)
    )


def add_placeholder(graph_module: fx.GraphModule, name: str, example_value: torch.Tensor | None = None) -> fx.Node:
    """Append an input. It looks like a parameter to AOTAutograd: unguarded, with a stable address."""
    # Dynamo's inputs come first. Thousands of inputs are added, so searching the whole graph for each is too slow.
    first_call = next(node for node in graph_module.graph.nodes if node.op != "placeholder")
    with graph_module.graph.inserting_after(first_call.prev):
        node = graph_module.graph.placeholder(name)
    node._dynamo_source = ConstantSource(name)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    if example_value is not None:
        node.meta["example_value"] = example_value
    return node


def writes_in_place(node: fx.Node) -> bool:
    """Whether a call may write into one of its arguments."""
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    is_named_so = name.endswith("_") and not name.endswith("__")
    if node.op == "call_method":
        return is_named_so or name in _IN_PLACE_METHODS
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):  # also custom ops
        return bool(node.target._schema.is_mutable)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        overloads = [getattr(node.target, overload) for overload in node.target.overloads() if "out" not in overload]
        return "out" in node.kwargs or any(overload._schema.is_mutable for overload in overloads)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "mutation" in name or any(any(map(writes_in_place, body.nodes)) for body in _bodies(node))
    in_place = is_named_so or node.target in _IN_PLACE_OPERATORS
    return in_place or "out" in node.kwargs or _asked_to_write_in_place(node)


def _bodies(node: fx.Node) -> Iterator[fx.Graph]:
    """The graphs that are arguments of a higher-order operator, such as ``torch.cond`` or checkpointing."""
    for value in node.all_input_nodes:
        body = operator.attrgetter(str(value.target))(value.graph.owning_module) if value.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield body.graph


def _asked_to_write_in_place(node: fx.Node) -> bool:
    """Whether a function of ``torch.nn.functional`` is called with ``inplace=True``, as activations are, keeps running
    statistics, as norms do, or limits the norm of embeddings; by name or by position."""
    if not getattr(node.target, "__module__", "").startswith("torch.nn.functional"):
        return False
    keeps = _given(node, "running_mean") is not None and (_given(node, "training") or _given(node, "use_input_stats"))
    return bool(_given(node, "inplace") or keeps or _given(node, "max_norm") is not None)


def _given(node: fx.Node, name: str) -> Any:
    """An argument of a call of a Python function, or its default; None if there is none of this name."""
    parameters = _parameters(node.target)
    if name not in parameters:
        return None
    return argument(node, list(parameters).index(name), name, parameters[name].default)


@functools.lru_cache(1024)
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers, so that its result differs each time."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if not node.op.startswith("call_") or not _RANDOM.fullmatch(str(name)):
        return False
    is_functional = getattr(node.target, "__module__", "").startswith("torch.nn.functional")
    return not is_functional or _given(node, "training") is not False  # usually dropout


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether a call is a dropout that returns its input."""
    if node.target is not torch.nn.functional.dropout or argument(node, 3, "inplace", False):
        return False
    return argument(node, 1, "p", 0.5) == 0 or not argument(node, 2, "training", True)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, passed by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def example(node: fx.Node) -> torch.Tensor:
    """The (fake) tensor that Dynamo saw a node produce."""
    value = node.meta["example_value"]
    assert isinstance(value, torch.Tensor)
    return value


def replace_call(
    graph_module: fx.GraphModule, node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]
) -> fx.Node:
    """Replace ``node`` by a call of ``target`` with the same metadata; erases the old node."""
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)
    return new
