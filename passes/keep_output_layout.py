from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx

from onlinequant_backend.graph import fx_utils
from onlinequant_backend.tensors import CHANNELS_LAST
from onlinequant_backend.torch_internals import dynamo_interface

from .context import PassContext

_contiguous = torch.ops.aten.contiguous.default
_IS_KEPT = "has_float_layout"  # in a node's ``meta``


def keep_output_layout(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Give the graph's outputs the strides of the float graph's: 8-bit convolutions write channels last.

    Before::

        return (%conv,)

    After, where the float graph returned rows of pixels::

        %contiguous = call_function[target=aten.contiguous](args = (%conv,), kwargs = {memory_format: contiguous})
        return (%contiguous,)

    A view of rows of pixels, such as the tokens of a patch embedding, is permuted to memory order, made contiguous, and
    permuted back.

    Dynamo guards on the strides of a graph's inputs, and one graph's output is the next one's input: without this, the
    change to the 8-bit graph would recompile every later graph. It costs nothing if the layout is right already. Does
    not change outputs that have gaps or share values.
    """
    output = graph_module.graph.output_node()
    changed = 0
    for node in list(output.all_input_nodes):
        if node.op != "placeholder" and not node.meta.get(_IS_KEPT):
            changed += in_float_layout(graph_module, node, output) is not None
    return changed


def in_float_layout(graph_module: fx.GraphModule, node: fx.Node, before: fx.Node) -> fx.Node | None:
    """Have ``before`` and all later nodes read ``node`` with the strides that it has in the float graph; None if there
    are gaps or values share memory."""
    memory_format, order = _layout(node)
    if order is None:
        return None
    with graph_module.graph.inserting_before(before):
        ordered = _permuted(graph_module, node, order)
        restored = graph_module.graph.call_function(_contiguous, (ordered,), {"memory_format": memory_format})
        restored.meta["example_value"] = ordered.meta["example_value"]
        own = {ordered, restored}
        restored = _permuted(graph_module, restored, [order.index(i) for i in range(len(order))])
    restored.meta[_IS_KEPT] = True
    later = {user for user in node.users if user not in own and not user < before}
    node.replace_all_uses_with(restored, delete_user_cb=later.__contains__)
    return restored


def _permuted(graph_module: fx.GraphModule, node: fx.Node, order: Sequence[int]) -> fx.Node:
    if list(order) == sorted(order):
        return node
    permuted = graph_module.graph.call_function(torch.ops.aten.permute.default, (node, list(order)))
    permuted.meta["example_value"] = fx_utils.example(node).permute(*order)
    return permuted


def _layout(node: fx.Node) -> tuple[torch.memory_format, list[int] | None]:
    """The memory format of an output after its dimensions are permuted to this order; None if there is no such
    order."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return torch.contiguous_format, None
    # The traced strides may be symbolic, so use a meta tensor with concrete ones.
    sizes, strides = ([dynamo_interface.hint(size) for size in numbers] for numbers in (value.shape, value.stride()))
    traced = torch.empty_strided(sizes, strides, dtype=torch.float32, device="meta")
    as_it_is = list(range(value.dim()))
    for memory_format in (torch.contiguous_format, CHANNELS_LAST.get(value.dim(), torch.contiguous_format)):
        if traced.is_contiguous(memory_format=memory_format):
            return memory_format, as_it_is
    order = sorted(as_it_is, key=lambda i: -strides[i])
    return torch.contiguous_format, order if traced.permute(order).is_contiguous() else None
