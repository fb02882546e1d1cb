from __future__ import annotations

import torch.fx as fx

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils, layer_nodes

from .context import PassContext
from .quantized_operands import quantized_operands


def rewrite_conv(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Replace convolutions whose input is quantized by the 8-bit op.

    Before::

        %y = call_function[target=torch.conv2d](args = (%quantize, %w, %b, (1, 1), same, (1, 1), 1))

    After::

        %y = call_function[target=onlinequant.conv](
            args = (%quantize, %onlinequant_qparams_0, %onlinequant_weight_0, %onlinequant_scale_0, %b,
                    [1, 1], [1, 1], [1, 1], torch.float16))

    Padding given as a string becomes numbers. Does not change float convolutions.
    """
    rewritten = 0
    for node, info in layer_nodes(graph_module):
        operands = quantized_operands(graph_module, node, info, context) if info.kind == "conv" else None
        if operands is not None:
            assert info.geometry is not None
            geometry = map(list, info.geometry)
            fx_utils.replace_call(graph_module, node, ops.conv, (*operands, *geometry, fx_utils.example(node).dtype))
            rewritten += 1
    return rewritten
