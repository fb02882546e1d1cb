"""FX graphs and the kinds of their inputs as bytes, so that another process can compile them.

A tensor is serialized as the properties that Inductor uses: shape, strides, dtype, device and storage offset. Its
values are not transferred; the other process creates a fake tensor. ``torch.fx`` pickles a graph as Python source,
which loses node metadata that AOTAutograd reads: the sources of inputs, and which values are tensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .. import ops as ops  # registers the ops that the graphs are made of, in a process that has just started
from ..graph import fx_utils
from ..torch_internals import dynamo_interface

# The metadata of a module and its nodes that AOTAutograd reads; the rest, from Dynamo and the passes, is not needed
# once a graph is rewritten.
_MODULE_META = ("dynamo_compile_id", "dynamo_flat_name_to_original_fqn")
_STATIC = "_dynamo_static_input_type"
_MOST_VALUES = 4096  # of a constant, which is transferred with its values


class NotPortableError(Exception):
    """A value exists only in this process."""


def dumps(value: Any) -> bytes:
    """``value`` as bytes; raises NotPortableError if it holds an object that other processes cannot have."""
    file = io.BytesIO()
    try:
        _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise NotPortableError(str(error) or type(error).__name__) from error
    return file.getvalue()


def loads(data: bytes, fake_mode: FakeTensorMode, sizes: Mapping[str, int | torch.SymInt]) -> Any:
    """The inverse of ``dumps``. Its tensors are fake, in ``fake_mode``; ``sizes``: its symbols by their names."""
    return _Unpickler(io.BytesIO(data), fake_mode, sizes).load()


def standard(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that is equal in every process: the keys of AOTAutograd's cache include all attributes of a module."""
    nodes, constants, meta, sources = _described(module)
    inner = {name: standard(value) if isinstance(value, fx.GraphModule) else value for name, value in constants.items()}
    return _graph_module(nodes, inner, meta, sources)


def kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The properties of a tensor that Inductor uses: shape, strides, offset, dtype and device."""
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


def fake_tensors(fake_mode: FakeTensorMode, values: Sequence[Any]) -> list[Any]:
    """``values`` with a fake tensor of its kind for each tensor, the same one for repeated tensors."""
    made: dict[int, torch.Tensor] = {}
    # Ordinary tensors even in inference mode, since the mode is part of the keys of AOTAutograd's cache.
    with fake_mode, torch.inference_mode(False), torch.no_grad():
        for value in values:
            if isinstance(value, torch.Tensor) and id(value) not in made:
                made[id(value)] = _fake(value)
    return [made[id(value)] if isinstance(value, torch.Tensor) else value for value in values]


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor, or, for a tensor subclass such as a quantized one, the same subclass around fake tensors."""
    if not is_traceable_wrapper_subclass(tensor):
        return _made(*kind(tensor))
    fake: torch.Tensor = transform_subclass(tensor, lambda _name, part: _fake(part))
    return fake


def _made(
    shape: Sequence[Any], stride: Sequence[Any], offset: Any, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if isinstance(offset, int) and offset:
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        return torch.empty(offset + max(last, 0) + 1, dtype=dtype, device=device).as_strided(shape, stride, offset)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if is_traceable_wrapper_subclass(value):
            raise NotPortableError(f"a tensor of the type {type(value).__name__}")
        if isinstance(value, torch.Tensor):
            return _tensor, kind(value)
        if isinstance(value, torch.SymInt):
            return _size, (value.node.expr,)
        if isinstance(value, torch._ops.OpOverload):
            return _operator, (value.namespace, value._schema.name.rpartition("::")[2], value._overloadname)
        if isinstance(value, torch._ops.OpOverloadPacket):
            return _operator, (*value._qualified_op_name.split("::"), None)
        if isinstance(value, torch._ops.HigherOrderOperator):
            return _operator, ("higher_order", value.name(), None)
        return None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, fx.GraphModule):
            return NotImplemented
        nodes, constants, meta, sources = _described(value)
        return _graph_module, (nodes, {name: _portable(name, of) for name, of in constants.items()}, meta, sources)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, fake_mode: FakeTensorMode, sizes: Mapping[str, int | torch.SymInt]) -> None:
        super().__init__(file)
        self.fake_mode = fake_mode
        self.sizes = sizes

    def persistent_load(self, named: Any) -> Any:
        make, arguments = named
        return make(self, *arguments)


def _tensor(reader: _Unpickler, *kind: Any) -> torch.Tensor:
    with reader.fake_mode, torch.inference_mode(False), torch.no_grad():
        return _made(*kind)


def _size(reader: _Unpickler, expression: sympy.Expr) -> int | torch.SymInt:
    symbols = {symbol: reader.sizes[symbol.name] for symbol in expression.free_symbols}
    result: int | torch.SymInt = sympy_interp(PythonReferenceAnalysis, symbols, expression)
    return result


def _operator(_reader: _Unpickler, namespace: str, name: str, overload: str | None) -> Any:
    packet = getattr(getattr(torch.ops, namespace), name)
    return packet if overload is None else getattr(packet, overload)


class _Reference:
    """A reference to a node by its position in the graph."""

    def __init__(self, position: int) -> None:
        self.position = position


class _Values:
    """A constant with its values."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._values, self._dtype = tensor.tolist(), tensor.dtype

    def tensor(self) -> torch.Tensor:
        return torch.tensor(self._values, dtype=self._dtype, device="cpu")


def _described(module: fx.GraphModule) -> tuple[Any, ...]:
    """The arguments of ``_graph_module``."""
    references = {node: _Reference(position) for position, node in enumerate(module.graph.nodes)}
    nodes, constants = [], {}

    def referred(value: Any) -> Any:
        return references[value] if isinstance(value, fx.Node) else value

    for node in module.graph.nodes:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), referred)
        source = getattr(node, "_dynamo_source", None)
        nodes.append((node.op, node.name, node.target, args, kwargs, node.type, _meta(node), source))
        if node.op in ("get_attr", "call_module"):
            constants[node.target] = _constant(module, node.target)
    meta = {key: module.meta[key] for key in _MODULE_META if key in module.meta}
    return nodes, constants, meta, getattr(module, "_param_name_to_source", None)


def _meta(node: fx.Node) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    if "example_value" in node.meta:
        # AOTAutograd checks whether there is one. Those of Dynamo's symbols have no meaning in other processes.
        value = node.meta["example_value"]
        meta["example_value"] = value if fx_utils.is_concrete(value) else None
    if _STATIC in node.meta.get("tensor_dict", {}):
        meta["tensor_dict"] = {_STATIC: node.meta["tensor_dict"][_STATIC]}
    return meta


def _constant(module: fx.GraphModule, target: str) -> Any:
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _portable(target: str, value: Any) -> Any:
    if isinstance(value, fx.GraphModule):
        return value
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.numel() <= _MOST_VALUES:
        return _Values(value)
    raise NotPortableError(f"{target} is a {type(value).__name__} of this process")


def _graph_module(
    described: Sequence[tuple[Any, ...]], constants: Mapping[str, Any], meta: Mapping[str, Any], sources: Any
) -> fx.GraphModule:
    graph_ = fx.Graph()
    nodes: list[fx.Node] = []

    def resolved(value: Any) -> Any:
        return nodes[value.position] if isinstance(value, _Reference) else value

    for op, name, target, args, kwargs, type_, node_meta, source in described:
        args, kwargs = fx.node.map_aggregate((args, kwargs), resolved)
        node = graph_.create_node(op, target, args, kwargs, name, type_)
        node.meta.update(node_meta)
        if source is not None:
            node._dynamo_source = source
        nodes.append(node)
    values = {name: value.tensor() if isinstance(value, _Values) else value for name, value in constants.items()}
    module = dynamo_interface.graph_module(values, graph_)
    module.meta.update(meta)
    module._param_name_to_source = sources
    return module
