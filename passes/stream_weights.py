from __future__ import annotations

import math
from collections.abc import Sequence

import torch.fx as fx

from onlinequant_backend.graph import fx_utils, layer_nodes
from onlinequant_backend.graph.layer_info import weight_parameter, weight_reader
from onlinequant_backend.quantization.weight_streaming import stream, stream_first

from .context import PassContext

# Bytes copied ahead: enough to keep the bus busy while layers run whose weights are small for their time.
_AHEAD = 2**27


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

    The further arguments of ``stream`` are the weights whose copies begin then, since their layers come soon. A weight
    that the graph casts, such as one in float8, is copied before its cast. Does not change layers that read a weight
    through ``stream`` already.
    """
    reads = _reads(graph_module)
    begun = 1  # the first is copied when it is read
    for number, (node, weight, _) in enumerate(reads):
        end = _end_of_window(reads, number)
        upcoming = [other for _, other, _ in reads[begun:end]]
        begun = max(begun, end)
        with graph_module.graph.inserting_before(node):
            target = stream if number else stream_first
            node.replace_input_with(weight, graph_module.graph.call_function(target, (weight, *upcoming)))
    return len(reads)


def _reads(graph_module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node, int]]:
    """In order, the nodes that read weights for layers, the weights, and their bytes."""
    found = {}
    for node, info in layer_nodes(graph_module):
        weight = weight_parameter(node)
        if info.index is not None and weight is not None:
            size = math.prod(info.weight_shape) * fx_utils.example(weight).dtype.itemsize
            found[weight_reader(node)] = weight, size
    return [(node, *found[node]) for node in graph_module.graph.nodes if node in found]


def _end_of_window(reads: Sequence[tuple[fx.Node, fx.Node, int]], number: int) -> int:
    """The end of the weights that are copied while the layer with this number runs: at least the next one."""
    left = _AHEAD
    for end in range(number + 1, len(reads)):
        left -= reads[end][2]
        if left < 0 and end > number + 1:
            return end
    return len(reads)
