from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch.fx as fx

from onlinequant_backend.graph import fx_utils, layer_nodes
from onlinequant_backend.quantization.weight_streaming import stream, stream_first

from .context import PassContext

# Bytes and weights copied ahead: enough to keep the bus busy during small layers.
_AHEAD, _MOST = 2**26, 8


def stream_weights(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Have every layer that may be quantized read its weight through ``stream``, so that weights may be on the host.

    Before::

        %linear = call_function[target=torch._C._nn.linear](args = (%x, %w, %b))
        %linear_1 = call_function[target=torch._C._nn.linear](args = (%linear, %w_1, %b_1))

    After::

        %stream_first = call_function[target=stream_first](args = (%w, %w_1))
        %linear = call_function[target=torch._C._nn.linear](args = (%x, %stream_first, %b))
        %stream = call_function[target=stream](args = (%w_1,))
        %linear_1 = call_function[target=torch._C._nn.linear](args = (%linear, %stream, %b_1))

    The further arguments of ``stream`` are the weights that the next layers read. Does not change layers that read a
    weight through ``stream`` already.
    """
    reads = [
        (node, weight, math.prod(info.weight_shape) * info.dtype.itemsize)
        for node, info in layer_nodes(graph_module)
        if info.index is not None
        and isinstance(weight := fx_utils.argument(node, 1, "weight"), fx.Node)
        and weight.op == "placeholder"
    ]
    for number, (node, weight, _) in enumerate(reads):
        upcoming = _upcoming([read[1:] for read in reads[number + 1 : number + 1 + _MOST]])
        with graph_module.graph.inserting_before(node):
            target = stream if number else stream_first
            node.replace_input_with(weight, graph_module.graph.call_function(target, (weight, *upcoming)))
    return len(reads)


def _upcoming(weights: Sequence[tuple[fx.Node, int]]) -> list[fx.Node]:
    ends = itertools.accumulate(size for _, size in weights)
    return [weight for i, ((weight, _), end) in enumerate(zip(weights, ends, strict=True)) if not i or end < _AHEAD]
