"""Few compiles for many shapes: one graph for the first shape, and one with symbolic sizes for all others."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx

from . import fx_utils

_asked: weakref.WeakSet[object] = weakref.WeakSet()


def is_first(layer: object) -> bool:
    """Whether this is the first such call for the model of ``layer``."""
    if layer in _asked:
        return False
    _asked.add(layer)
    return True


def has_symbols(graph_module: fx.GraphModule) -> bool:
    """Whether any of the graph's inputs has a symbolic size, or is one."""
    return any(symbols_of(node.meta.get("example_value")) for node in fx_utils.placeholders(graph_module))


def symbols_of(value: Any) -> set[sympy.Symbol]:
    """The symbols in a traced input: in a symbolic integer, or in the sizes and strides of a tensor."""
    if isinstance(value, torch.SymInt):
        return set(value.node.expr.free_symbols)
    if isinstance(value, torch.Tensor):
        numbers = [*value.shape, *value.stride()]
        return {
            symbol for number in numbers if isinstance(number, torch.SymInt) for symbol in number.node.expr.free_symbols
        }
    return set()


def broadcast_sizes(graph_module: fx.GraphModule, arguments: Sequence[Any]) -> frozenset[sympy.Symbol]:
    """Leading sizes of 1 next to larger ones, such as one time step for several images: these are broadcast, and must
    not be treated as the batch size."""
    traced: list[Any] = [node.meta.get("example_value") for node in fx_utils.placeholders(graph_module)]
    leading = {
        value.shape[0].node.expr: argument.shape[0]
        for value, argument in zip(traced, arguments, strict=True)
        if isinstance(value, torch.Tensor) and value.dim() and isinstance(value.shape[0], torch.SymInt)
    }
    ones = frozenset(symbol for symbol, size in leading.items() if size == 1)
    return ones if len(ones) < len(leading) else frozenset()
