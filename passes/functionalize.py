from __future__ import annotations

import operator

import torch
import torch.fx as fx

from onlinequant_backend.graph import fx_utils
from onlinequant_backend.graph.aliasing import Memory

from .context import PassContext

_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def functionalize(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Replace in-place operators on tensors that the graph itself created by out-of-place ones.

    Before::

        %iadd = call_function[target=operator.iadd](args = (%x, %y))
        %cat = call_function[target=torch.cat](args = ([%x, %z],))

    After: the same values, in a graph that can be run twice and captured, and in which fusions see all readers::

        %add = call_function[target=operator.add](args = (%x, %y))
        %cat = call_function[target=torch.cat](args = ([%add, %z],))

    Does not change writes into the graph's inputs, writes that are read later through another view of the same memory,
    and sums of several dtypes.
    """
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
    memory = Memory(graph_module)
    changed = 0
    for node in list(graph_module.graph.nodes):
        if node.target in _OUT_OF_PLACE and _is_private(node, memory, order):
            written = node.args[0]
            written.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
            node.target = _OUT_OF_PLACE[node.target]
            changed += 1
    return changed


def _is_private(node: fx.Node, memory: Memory, order: dict[fx.Node, int]) -> bool:
    """Whether an in-place operator writes memory of the graph that is not read later through another view."""
    written, value = node.args[0], node.args[1]
    if not isinstance(written, fx.Node) or not isinstance(written.meta.get("example_value"), torch.Tensor):
        return False
    other = value.meta.get("example_value") if isinstance(value, fx.Node) else value
    target = fx_utils.example(written)
    if not isinstance(other, (torch.Tensor, int, float)) or torch.result_type(target, other) != target.dtype:
        return False
    for owner in memory.owners(written):
        if owner.op in ("placeholder", "get_attr"):
            return False
        is_before = order[owner] < order[node]
        if is_before and owner is not written and any(order[user] > order[node] for user in owner.users):
            return False
    return True
