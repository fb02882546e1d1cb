"""Fake inputs to compile with, of one shape or with symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sympy
import torch
import torch.fx as fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ..graph import fx_utils
from ..graph.dynamic_shapes import broadcast_sizes, symbols_of
from ..torch_internals.fake_tensors import new_fake_mode
from . import graph_transport

# A batch of one would make a graph that takes no other, so graphs with symbolic sizes are compiled as for two. Then
# torch assumes that a size is not 1 wherever it checks which strides matter. For a size of 1 the stride does not
# matter, so such a graph is nearly always valid for it as well; ``CompiledGraphs`` verifies this.
SMALLEST = 2


class Symbol(NamedTuple):
    """A symbolic size: its name in Dynamo, its own name, and its first value."""

    source: str
    name: str
    hint: int


class FixedInputs:
    """Fake inputs for a graph of one shape; the attributes are those of ``SymbolicInputs``."""

    symbols: tuple[Symbol, ...] = ()

    def __init__(self, arguments: Sequence[Any]) -> None:
        self.fake_mode = new_fake_mode(ShapeEnv())
        self.values = graph_transport.fake_tensors(self.fake_mode, arguments)


def symbolic_sizes(shape_env: ShapeEnv, symbols: Sequence[Symbol]) -> dict[str, int | torch.SymInt]:
    """The sizes of ``SymbolicInputs.symbols``, by name, in a shape environment of another process."""
    return {symbol.name: _new_size(shape_env, symbol.source, symbol.hint) for symbol in symbols}


def _new_size(shape_env: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    source = ConstantSource(name)
    own = shape_env.create_symbol(
        hint, source, DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=True
    )
    number: Any = shape_env.create_symintnode(own, hint=hint, source=source)
    return number


class SymbolicInputs:
    """Fake inputs of a graph with symbolic sizes, in a shape environment of their own. Dynamo's environment cannot be
    used after it has made its guards: Inductor's assumptions about sizes must be checked, and ``fits`` does so.

    Attributes:
        fake_mode: the mode of the fake values.
        values: for each input of the graph a fake tensor, a symbolic integer, or the argument itself.
        symbols: its sizes, from which another process can make equal ones; see ``symbolic_sizes``.
    """

    def __init__(self, graph_module: fx.GraphModule, arguments: Sequence[Any]) -> None:
        """Make fake inputs for the ``arguments`` of a call; sizes that Dynamo has fixed stay fixed."""
        self._shape_env = ShapeEnv(duck_shape=False)
        self._guards: str | None = None
        self.fake_mode = new_fake_mode(self._shape_env)
        traced = [node.meta.get("example_value") for node in fx_utils.placeholders(graph_module)]
        # Every symbol that a graph uses is among its inputs; the same one may be there twice.
        self._positions = {
            value.node.expr: position
            for position, value in enumerate(traced)
            if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol)
        }
        self._ones = broadcast_sizes(graph_module, arguments) & self._positions.keys()
        self._sizes: dict[sympy.Symbol, int | torch.SymInt] = {
            symbol: 1 if symbol in self._ones else _new_size(self._shape_env, str(symbol), max(arguments[at], SMALLEST))
            for symbol, at in self._positions.items()
        }
        self.symbols = tuple(
            Symbol(str(symbol), str(size.node.expr), int(size.node.hint))
            for symbol, size in self._sizes.items()
            if isinstance(size, torch.SymInt)
        )
        with self.fake_mode, torch.inference_mode(False):
            self.values = [self._fake(*pair) for pair in zip(traced, arguments, strict=True)]

    def finish(self) -> None:
        """Record, after compiling, the assumptions about the sizes."""
        sizes = [size for size in self._sizes.values() if isinstance(size, torch.SymInt)]
        self._guards = self._shape_env.produce_guards_expression(sizes)

    def fits(self, arguments: Sequence[Any], at_least: int = 0) -> bool:
        """Whether the compiled code is valid for the sizes of another call; smaller ones count as ``at_least``."""
        if any(arguments[self._positions[symbol]] != 1 for symbol in self._ones):
            return False
        if self._guards is None:
            return True
        free = [position for symbol, position in self._positions.items() if symbol not in self._ones]
        sizes = [max(arguments[position], at_least) for position in free]
        return bool(self._shape_env.evaluate_guards_expression(self._guards, sizes))

    def _fake(self, traced: Any, argument: Any) -> Any:
        if isinstance(traced, torch.SymInt):
            return self._own(traced)
        if not isinstance(argument, torch.Tensor):
            return argument
        if not symbols_of(traced):
            return graph_transport.fake_tensors(self.fake_mode, [argument])[0]
        shape, strides = (tuple(map(self._own, numbers)) for numbers in (traced.shape, traced.stride()))
        return torch.empty_strided(shape, strides, dtype=argument.dtype, device=argument.device)

    def _own(self, number: int | torch.SymInt) -> int | torch.SymInt:
        """A size of Dynamo's, expressed in this object's symbols."""
        if not isinstance(number, torch.SymInt):
            return number
        result: int | torch.SymInt = sympy_interp(PythonReferenceAnalysis, self._sizes, number.node.expr)
        return result
