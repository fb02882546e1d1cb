"""Which values of a graph share memory, and which memory it writes into, by storages rather than by names of ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from ..tensors import plain_tensors
from . import fx_utils


class Memory:
    """The memory of the values of ``graph_module``, as traced by Dynamo. Nodes that a pass has replaced since then
    still count, so values may seem to share more memory than they do.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._same: dict[int, int] = {}  # storages that are in fact another one
        self._owners: dict[int, list[fx.Node]] = {}
        self._written: set[int] = set()
        self._is_anything_written = False
        for node in graph_module.graph.nodes:
            if fx_utils.is_idle_dropout(node):  # it returns its input, but a copy for fake tensors
                self._same.update(zip(storages(node), self._of(node.all_input_nodes[0]), strict=False))
            for storage in self._of(node):
                self._owners.setdefault(storage, []).append(node)
            if fx_utils.writes_in_place(node):
                self._note_write(node)
        results = graph_module.graph.output_node().all_input_nodes
        self._returned = Counter(storage for result in results for storage in self._of(result))

    def _note_write(self, call: fx.Node) -> None:
        # Only lists of op names would tell which of its arguments a call writes into.
        for node in (call, *call.all_input_nodes):
            self._written |= self._of(node)
            self._is_anything_written |= node is not call and "example_value" not in node.meta

    def _of(self, node: fx.Node) -> set[int]:
        return {self._same.get(storage, storage) for storage in storages(node)}

    def owners(self, node: fx.Node) -> list[fx.Node]:
        """The nodes, in order, whose values share memory with that of ``node``, including itself."""
        found = {owner: None for storage in self._of(node) for owner in self._owners[storage]}
        return list(found) or [node]

    def is_written(self, node: fx.Node) -> bool:
        """Whether the memory of ``node`` is written in place, through any alias and at any time."""
        return self._is_anything_written or not self._written.isdisjoint(self._of(node))

    def returns(self, node: fx.Node) -> int:
        """How many of the graph's results share memory with ``node``."""
        return sum(self._returned[storage] for storage in self._of(node))

    def has_results_in_common(self) -> bool:
        """Whether any of the graph's results shares memory with another one or with an input."""
        inputs = ("placeholder", "get_attr")
        return any(
            count > 1 or any(owner.op in inputs for owner in self._owners[storage])
            for storage, count in self._returned.items()
        )


def storages(node: fx.Node) -> Iterator[int]:
    """Identifiers of the storages of the tensors that ``node`` returns."""
    for value in pytree.tree_leaves(node.meta.get("example_value")):
        if isinstance(value, torch.Tensor):
            for tensor in plain_tensors(value):
                yield tensor.untyped_storage()._cdata
