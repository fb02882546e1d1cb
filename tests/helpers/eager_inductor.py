"""A stand-in for Inductor, which is quick, and what tests with it say of models and graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from onlinequant_backend import ops


class EagerInductor:
    """Stands in for Inductor: keeps the graphs that it is given and runs them eagerly."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.inputs: list[Sequence[Any]] = []
        self.error: Exception | None = None

    def __call__(
        self, graph_module: torch.fx.GraphModule, inputs: Sequence[Any], options: Any, *, outside_dynamo: bool
    ) -> Callable[..., Any]:
        if self.error is not None:
            raise self.error
        self.graphs.append(graph_module)
        self.inputs.append(inputs)
        return graph_module

    def quantized_ops(self) -> int:
        targets = [node.target for node in self.graphs[-1].graph.nodes]
        return sum(target in (ops.linear, ops.conv) for target in targets)


def dynamo_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
