from __future__ import annotations

import torch
import torch.fx as fx

from onlinequant_backend import compat
from onlinequant_backend.layout import CHANNELS_LAST

from .layer import PassContext

_contiguous = torch.ops.aten.contiguous.default


def keep_output_layout(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Give the graph's outputs the strides that the float graph's have: 8-bit convolutions write channels last.

    Before::

        return (%conv,)

    After, where the float graph returned rows of pixels::

        %contiguous = call_function[target=aten.contiguous](args = (%conv,), kwargs = {memory_format: contiguous})
        return (%contiguous,)

    Dynamo guards on the strides of a graph's inputs, and one graph's output is the next one's input: without this, the
    swap to 8 bit would make Dynamo compile every later graph again. It costs nothing where the layout is right already.
    Leaves alone outputs that are neither contiguous nor channels last, and those of fewer than four dimensions.
    """
    output = graph_module.graph.output_node()
    changed = 0
    for node in list(output.all_input_nodes):
        memory_format = _memory_format(node)
        if memory_format is None or node.op == "placeholder" or node.target is _contiguous:
            continue
        with graph_module.graph.inserting_before(output):
            restored = graph_module.graph.call_function(_contiguous, (node,), {"memory_format": memory_format})
        restored.meta["example_value"] = node.meta["example_value"]
        output.replace_input_with(node, restored)
        changed += 1
    return changed


def _memory_format(node: fx.Node) -> torch.memory_format | None:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() not in CHANNELS_LAST:
        return None
    # The traced strides may be symbolic, so ask a tensor of the same strides that has no memory.
    sizes, strides = ([compat.hint(size) for size in numbers] for numbers in (value.shape, value.stride()))
    traced = torch.empty_strided(sizes, strides, dtype=torch.float32, device="meta")
    for memory_format in (torch.contiguous_format, CHANNELS_LAST[value.dim()]):
        if traced.is_contiguous(memory_format=memory_format):
            return memory_format
    return None
