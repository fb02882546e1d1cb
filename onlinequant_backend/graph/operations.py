"""A graph's operations as text: equal in every process, on every device and at every size of its inputs."""

from __future__ import annotations

import hashlib
import operator
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_leaves

from ..tensors import sample
from . import parameter_names

# The address in the ``repr`` of a function or module, which differs between processes.
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
# Calls with sizes as arguments, single or in a list. Lists in other calls hold dimensions, indices or values.
_TAKE_SIZES = frozenset(
    [
        *(
            "arange",
            "broadcast_to",
            "empty",
            "expand",
            "eye",
            "linspace",
            "narrow",
            "new_empty",
            "new_ones",
            "new_zeros",
        ),
        *("ones", "rand", "randn", "repeat", "repeat_interleave", "reshape", "split", "tile", "unflatten", "unfold"),
        *("view", "zeros"),
    ]
)
# Calls with sizes in a list and other numbers outside of it.
_TAKE_LISTS_OF_SIZES = _TAKE_SIZES | frozenset(
    ["as_strided", "fold", "full", "interpolate", "layer_norm", "new_full", "pad", "rms_norm", "split_with_sizes"]
)
_SIZE = "#"
_SAMPLES = 1024  # values of a constant


def text(graph_module: fx.GraphModule) -> str:
    """A text that is equal for graphs with the same operations on the same parameters, for inputs of any sizes: their
    layers read the same values. Excludes calls that only compute sizes, as in graphs for all sizes."""
    return "\n".join(_Writer(graph_module).lines())


def is_of_this_process(graph_module: fx.GraphModule) -> bool:
    """Whether a graph holds objects that another process may not have, such as a closure: its name does not identify
    the values that it captured."""
    return any(
        (node.op == "call_function" and name(node.target) is None)
        or any(map(_is_unknown, tree_leaves((node.args, node.kwargs))))
        for node in graph_module.graph.nodes
    )


def _is_unknown(argument: Any) -> bool:
    if isinstance(argument, fx.Node):
        return False
    return name(argument) is None if callable(argument) else ADDRESS.search(repr(argument)) is not None


def name(target: Any) -> str | None:
    """The name of a function or type, valid in every process; None if that name resolves to another object or to
    none."""
    if isinstance(target, _OPERATORS):
        return str(target)
    module, qualified = getattr(target, "__module__", None) or "", getattr(target, "__qualname__", None)
    if isinstance(target, _BUILT_IN):
        return f"{module}.{qualified}"
    if not isinstance(target, (types.FunctionType, type)):  # other callables may hold values
        return None
    for known_as in (qualified, target.__name__):  # some of torch's functions were renamed after their definition
        found: Any = sys.modules.get(module)
        for part in str(known_as).split("."):
            found = getattr(found, part, None)
        if found is target:
            return f"{module}.{known_as}"
    return None


class _Writer:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._module = graph_module
        self._names = parameter_names.parameter_names(graph_module)
        self._inputs = 0

    def lines(self) -> Iterator[str]:
        for number, node in enumerate(filter(_is_of_account, self._module.graph.nodes)):
            called = str(node.target if isinstance(node.target, str) else name(node.target))
            short = called.rpartition(".")[2]
            given = {**dict(enumerate(node.args)), **node.kwargs}
            shown = {key: self._shown(value, short in _TAKE_SIZES, short) for key, value in given.items()}
            yield " ".join([called, *(f"{key}={value}" for key, value in shown.items() if value != _SIZE)])
            self._names[node] = f"%{number}"
            if node.op == "get_attr":
                yield from _constant(operator.attrgetter(called)(self._module))

    def _shown(self, value: Any, is_size: bool, called: str) -> str:
        if isinstance(value, fx.Node):
            return self._name(value)
        if isinstance(value, (slice, torch.device)) or (is_size and type(value) in (int, list, tuple, torch.Size)):
            return _SIZE
        if isinstance(value, (list, tuple)):
            are_sizes = called in _TAKE_LISTS_OF_SIZES
            return f"[{' '.join(self._shown(item, are_sizes, called) for item in value)}]"
        known = name(value) if callable(value) else None
        return known or ADDRESS.sub("", repr(value))

    def _name(self, node: fx.Node) -> str:
        """Numbers inputs in the order of their first use, since inputs that are sizes come in between."""
        if node.op == "placeholder" and node not in self._names and not _is_size(node):
            self._names[node] = f"@{self._inputs}"
            self._inputs += 1
        return self._names.get(node, _SIZE)


def _is_of_account(node: fx.Node) -> bool:
    """Whether a call does more than compute a size."""
    return node.op not in ("placeholder", "output") and not _is_size(node)


def _is_size(node: fx.Node) -> bool:
    leaves = tree_leaves(node.meta["example_value"]) if "example_value" in node.meta else []
    return bool(leaves) and all(isinstance(leaf, _NUMBERS) for leaf in leaves)


def _constant(value: Any) -> Iterator[str]:
    if isinstance(value, fx.GraphModule):
        yield from _Writer(value).lines()
    elif isinstance(value, torch.Tensor):
        values = sample(value, _SAMPLES).cpu().view(torch.uint8).numpy().tobytes()
        yield f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(values).hexdigest()}"
    else:
        yield ADDRESS.sub("", repr(value))
