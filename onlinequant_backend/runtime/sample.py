"""One call in float, kept to compare the 8-bit graph with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..graph.graph_inputs import GraphInputs


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A call and its float result, without the model's parameters, which it must not keep alive.

    Attributes:
        others: the arguments by position.
        result: copies of what the graph returned.
        fingerprint: of the parameters.
    """

    others: dict[int, Any]
    result: Any
    fingerprint: str

    @classmethod
    def of(cls, inputs: GraphInputs, args: Sequence[Any], result: Any, fingerprint: str) -> Sample:
        """The sample of a call of a graph with these ``inputs``."""
        kept = inputs.kept(args)
        copies = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), result)
        return cls({position: kept[position] for position in inputs.others}, copies, fingerprint)

    def args(self, args: Sequence[Any]) -> list[Any]:
        """Its arguments, with the parameters of ``args``."""
        return [self.others.get(position, value) for position, value in enumerate(args)]
