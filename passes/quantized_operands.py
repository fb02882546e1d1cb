from __future__ import annotations

from typing import Any

import torch.fx as fx

from onlinequant_backend import graph, ops

from .context import PassContext
from .layer import LayerInfo


def quantized_operands(
    graph_module: fx.GraphModule, node: fx.Node, info: LayerInfo, context: PassContext
) -> tuple[Any, ...] | None:
    """The first operands of an 8-bit op: (xq, qparams, weight, weight_scale, bias); None for a node that stays.

    Appends the two weight inputs to the graph and to ``context.extra_inputs``.
    """
    x = graph.argument(node, 0, "input")
    if not (isinstance(x, fx.Node) and x.target is ops.quantize) or node.target in (ops.linear, ops.conv):
        return None
    assert info.index is not None
    context.extra_inputs += [("weight", info.index), ("weight_scale", info.index)]
    weight = graph.add_placeholder(graph_module, f"onlinequant_weight_{info.index}")
    scale = graph.add_placeholder(graph_module, f"onlinequant_scale_{info.index}")
    return x, x.args[1], weight, scale, graph.argument(node, 2, "bias")
