from __future__ import annotations

from typing import Any

import torch.fx as fx

from onlinequant_backend.graph import fx_utils, layer_reads
from onlinequant_backend.quantization.observation import observe

from .context import PassContext


def insert_observers(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Pass the input and output of every layer that may be quantized to an observation.

    Before::

        %linear = call_function[target=torch._C._nn.linear](args = (%x, %w, %b))

    After, with one new graph input, the observation::

        %linear = call_function[target=torch._C._nn.linear](args = (%x, %w, %b))
        %observe = call_function[target=observe](args = (%onlinequant_observation, 0, 0, %x, %linear, %b))

    ``observe`` returns ``%linear`` unchanged, so the graph's result stays exact. Its numbers are the index of the layer
    and that of the first layer that reads the same values; both share their observations. Does not change layers that
    cannot be quantized, and layers that are observed already.
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
    return len(layers)
