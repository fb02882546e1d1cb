from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from onlinequant_backend.graph import fx_utils
from onlinequant_backend.graph.aliasing import Memory

from .context import PassContext

_ACTIVATIONS = (
    *(torch.nn.functional.silu, torch.nn.functional.relu, torch.nn.functional.gelu),
    *(torch.relu, torch.sigmoid, torch.tanh),
)


def share_activations(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Compute an activation of a tensor once, such as that of the time embedding, which every residual block computes.

    Before::

        %silu = call_function[target=torch.nn.functional.silu](args = (%temb,))
        %first = call_function[target=torch._C._nn.linear](args = (%silu, %w0, %b0))
        %silu_1 = call_function[target=torch.nn.functional.silu](args = (%temb,))
        %second = call_function[target=torch._C._nn.linear](args = (%silu_1, %w1, %b1))

    After: both linears read ``%silu``, so that they can share a quantized copy and be merged into one product. Does not
        change activations that, like any alias, are written in place or returned, or that are computed on different
        sides of a write.
    """
    first: dict[Any, fx.Node] = {}
    memory = Memory(graph_module)
    writes = shared = 0
    for node in list(graph_module.graph.nodes):
        writes += fx_utils.writes_in_place(node)
        if node.target not in _ACTIVATIONS or memory.is_written(node) or memory.returns(node):
            continue
        known = first.setdefault((node.target, node.args, tuple(sorted(node.kwargs.items())), writes), node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph_module.graph.erase_node(node)
            shared += 1
    return shared
