"""The inputs of a traced graph, classified once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ..tensors import clone_preserving_strides, getter
from . import fx_utils, parameter_names, specialization

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


@dataclass(frozen=True, eq=False)
class GraphInputs:
    """The kinds of the inputs, by their positions among a call's arguments.

    Attributes:
        names: of the graph's placeholders.
        parameters: positions of parameters and buffers.
        parameter_names: their qualified names, in the same order.
        others: positions of all others.
        numbers: those of the others that are numbers, either as tensors without dimensions or as Python numbers.
        wrapped_floats: those of the numbers that Dynamo has wrapped into tensors.
        open_floats: those of the wrapped floats that are inputs of compiled graphs rather than constants in them.
        take_parameters: returns the parameters among a call's arguments.
    """

    names: tuple[str, ...]
    parameters: tuple[int, ...]
    parameter_names: tuple[str, ...]
    others: tuple[int, ...]
    numbers: tuple[int, ...]
    wrapped_floats: frozenset[int]
    open_floats: frozenset[int]
    take_parameters: Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> GraphInputs:
        """The inputs of a graph whose parameters have been named (``parameter_names.name_parameters``)."""
        nodes = fx_utils.placeholders(graph_module)
        parameters = tuple(i for i, node in enumerate(nodes) if fx_utils.is_parameter(node))
        others = tuple(i for i, node in enumerate(nodes) if not fx_utils.is_parameter(node))
        wrapped = frozenset(i for i in others if specialization.is_wrapped_float(nodes[i]))
        return cls(
            names=tuple(node.name for node in nodes),
            parameters=parameters,
            parameter_names=tuple(parameter_names.parameter_names(graph_module).values()),
            others=others,
            numbers=tuple(
                i for i in others if i in wrapped or isinstance(nodes[i].meta.get("example_value"), _NUMBERS)
            ),
            wrapped_floats=wrapped,
            open_floats=frozenset(i for i in wrapped if specialization.is_open_float(nodes[i])),
            take_parameters=getter(parameters),
        )

    def named_parameters(self, parameters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters of a call by their qualified names."""
        return dict(zip(self.parameter_names, parameters, strict=True))

    def kept(self, args: Sequence[Any]) -> list[Any]:
        """A call's arguments for later use: copies, since the caller may overwrite its tensors after the call."""
        parameters = set(self.parameters)
        return [
            value if i in parameters or not isinstance(value, torch.Tensor) else clone_preserving_strides(value)
            for i, value in enumerate(args)
        ]
