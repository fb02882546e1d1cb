from __future__ import annotations

import torch
import torch.fx as fx

from onlinequant_backend.graph.layer_info import is_cast

from .context import PassContext


def drop_unused_inputs(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Erase inputs without readers, such as the float weights of 8-bit layers, and the casts of these.

    Before: ``placeholder[l_self_..._weight_]`` with no users. After: removed; the caller finds by name which of its
        arguments the graph still takes. Does not change other nodes: Dynamo's graphs may hold in-place calls whose
        result has no reader, and Inductor's cache checks its guards with sizes that have no reader.
    """
    unused = [
        node
        for node in reversed(graph_module.graph.nodes)
        if (node.op == "placeholder" and not isinstance(node.meta.get("example_value"), torch.SymInt)) or is_cast(node)
    ]
    erased = 0
    for node in unused:
        if not node.users:
            graph_module.graph.erase_node(node)
            erased += 1
    return erased
