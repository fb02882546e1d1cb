from __future__ import annotations

import torch.fx as fx

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils, layer_nodes

from .context import PassContext
from .quantized_operands import quantized_operands


def rewrite_linear(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Replace linears whose input is quantized by the 8-bit op.

    Before::

        %y = call_function[target=torch._C._nn.linear](args = (%quantize, %w, %b))

    After::

        %y = call_function[target=onlinequant.linear](
            args = (%quantize, %onlinequant_qparams_0, %onlinequant_weight_0, %onlinequant_scale_0, %b, torch.float16))

    The output dtype is that of the node, not of the weight: under autocast they differ. Does not change float linears.
    """
    rewritten = 0
    for node, info in layer_nodes(graph_module):
        operands = quantized_operands(graph_module, node, info, context) if info.kind == "linear" else None
        if operands is not None:
            fx_utils.replace_call(graph_module, node, ops.linear, (*operands, fx_utils.example(node).dtype))
            rewritten += 1
    return rewritten
