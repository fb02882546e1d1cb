from __future__ import annotations

import operator

import torch
import torch.fx as fx

from onlinequant_backend.graph import fx_utils
from onlinequant_backend.graph.aliasing import Memory

from .context import PassContext

_DIVISIONS = (operator.truediv, torch.div, torch.true_divide)


def drop_identities(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Remove calls that return their input unchanged: division by one, and dropout outside of training.

    Before::

        %dropout = call_function[target=torch.nn.functional.dropout](args = (%x, 0.0, False, False))
        %div = call_function[target=operator.truediv](args = (%dropout, 1.0))

    After: ``%x`` in their place, so that later passes find patterns without such calls between their nodes. Does not
        change in-place calls, divisions of tensors that are not floating-point, and results that need memory of their
        own: those that are returned, and those that, like ``%x`` or any alias, are written in place.
    """
    memory = Memory(graph_module)
    dropped = 0
    for node in list(graph_module.graph.nodes):
        if (_is_division_by_one(node) or fx_utils.is_idle_dropout(node)) and not _is_memory_needed(node, memory):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph_module.graph.erase_node(node)
            dropped += 1
    return dropped


def _is_division_by_one(node: fx.Node) -> bool:
    if node.target not in _DIVISIONS or len(node.args) != 2 or node.kwargs or len(node.all_input_nodes) != 1:
        return False
    number = node.args[1]
    value = node.all_input_nodes[0].meta.get("example_value")
    is_one = isinstance(number, (int, float)) and number == 1
    return is_one and isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_memory_needed(node: fx.Node, memory: Memory) -> bool:
    return memory.is_written(node) or memory.is_written(node.all_input_nodes[0]) or memory.returns(node) > 0
