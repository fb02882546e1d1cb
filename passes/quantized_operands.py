from __future__ import annotations

from typing import Any

import torch.fx as fx

from onlinequant_backend import ops
from onlinequant_backend.graph import LayerInfo, fx_utils

from .context import PassContext


def quantized_operands(
    graph_module: fx.GraphModule, node: fx.Node, info: LayerInfo, context: PassContext
) -> tuple[Any, ...] | None:
    """The first operands of an 8-bit op: (xq, qparams, weight, weight_scale, bias); None for a node that stays in
    float.

    Appends the two weight inputs to the graph and to ``context.extra_inputs``.
    """
    x = fx_utils.argument(node, 0, "input")
    if not (isinstance(x, fx.Node) and x.target is ops.quantize) or node.target in (ops.linear, ops.conv):
        return None
    assert info.index is not None
    context.extra_inputs += [("weight", info.index), ("weight_scale", info.index)]
    weight = fx_utils.add_placeholder(graph_module, f"onlinequant_weight_{info.index}")
    scale = fx_utils.add_placeholder(graph_module, f"onlinequant_scale_{info.index}")
    return x, x.args[1], weight, scale, fx_utils.argument(node, 2, "bias")
