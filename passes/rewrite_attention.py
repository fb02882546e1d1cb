from __future__ import annotations

import torch.fx as fx
import torch.nn.functional as F

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils
from onlinequant_backend.graph.attention_info import attention_nodes
from onlinequant_backend.kernels import formats

from .context import PassContext


def rewrite_attention(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Replace attention that was selected by this package's op.

    Before::

        %attention = call_function[target=scaled_dot_product_attention](args = (%query, %key, %value), ...)

    After, in float where that is a faster kernel::

        %attention = call_function[target=onlinequant.attention](args = (%query, %key, %value, 0.125, "fp8"))

    Its result is laid out as [batch, tokens, heads, size]. Does not change attention that was not selected.
    """
    rewritten = 0
    for node, info in attention_nodes(graph_module):
        if not info.is_replaced or node.target is not F.scaled_dot_product_attention:
            continue
        operands = tuple(fx_utils.argument(node, at, name) for at, name in enumerate(("query", "key", "value")))
        scale = fx_utils.argument(node, 6, "scale")
        factor = info.input_shape[-1] ** -0.5 if scale is None else scale
        format = context.precision.name if info.quantized else formats.FLOAT
        fx_utils.replace_call(graph_module, node, ops.attention, (*operands, factor, format))
        rewritten += 1
    return rewritten
