from __future__ import annotations

from typing import Any

import torch.fx as fx

from onlinequant_backend.graph import fx_utils, layer_reads
from onlinequant_backend.graph.attention_info import attention_nodes
from onlinequant_backend.quantization.observation import observe, observe_attention

from .context import PassContext


def insert_observers(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Pass the input and output of every layer that may be quantized to an observation.

    Before::

        %linear = call_function[target=torch._C._nn.linear](args = (%x, %w, %b))

    After, with one new graph input, the observation::

        %linear = call_function[target=torch._C._nn.linear](args = (%x, %w, %b))
        %observe = call_function[target=observe](args = (%onlinequant_observation, 0, 0, %x, %linear, %b))

    ``observe`` returns ``%linear`` unchanged, so the graph's result stays exact. Its numbers are the index of the layer
    and that of the first layer that reads the same values; both share their observations. Attention that may be in 8
    bit is given to ``observe_attention`` with its operands. Does not change what cannot be quantized, and what is
    observed already.
    """
    layers = [
        (node, info.index, read)
        for node, info, read in layer_reads(graph_module)
        if info.index is not None and not any(user.target is observe for user in node.users)
    ]
    if not layers:
        return 0
    observation = fx_utils.add_placeholder(graph_module, "onlinequant_observation")
    first_readers: dict[tuple[Any, int], int] = {}
    for node, index, read in layers:
        first = first_readers.setdefault(read, index)
        users = list(node.users)
        x, bias = fx_utils.argument(node, 0, "input"), fx_utils.argument(node, 2, "bias")
        with graph_module.graph.inserting_after(node):
            observed = graph_module.graph.call_function(observe, (observation, index, first, x, node, bias))
        for user in users:
            user.replace_input_with(node, observed)
    return len(layers) + _observe_attention(graph_module, observation)


def _observe_attention(graph_module: fx.GraphModule, observation: fx.Node) -> int:
    observed = 0
    for node, info in attention_nodes(graph_module):
        if not info.is_possible or info.is_short:
            continue
        users = list(node.users)
        operands = (fx_utils.argument(node, at, name) for at, name in enumerate(("query", "key", "value")))
        scale = fx_utils.argument(node, 6, "scale")
        with graph_module.graph.inserting_after(node):
            seen = graph_module.graph.call_function(observe_attention, (observation, info.name, *operands, scale, node))
        for user in users:
            user.replace_input_with(node, seen)
        observed += 1
    return observed
