from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from onlinequant_backend import ops
from onlinequant_backend.graph import LayerInfo, fx_utils, layer_nodes
from onlinequant_backend.graph.aliasing import Memory

from .context import PassContext


def merge_linears(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Merge 8-bit linears that read the same tensor into one product: q, k and v, and k and v of all cross-attentions.

    Before::

        %q = call_function[target=onlinequant.linear](args = (%x, %qparams, %weight_0, %scale_0, None, torch.float16))
        %k = call_function[target=onlinequant.linear](args = (%x, %qparams, %weight_1, %scale_1, None, torch.float16))

    After::

        %all = call_function[target=onlinequant.linear](args = (%x, %qparams, %merged_0, %scale, None, torch.float16))
        %split = call_function[target=aten.split_with_sizes](args = (%all, [640, 640], -1))
        %q = call_function[target=operator.getitem](args = (%split, 0))
        %k = call_function[target=operator.getitem](args = (%split, 1))

    One product with many columns fills the GPU better than several with few, and is one kernel launch. Does not change
    linears that differ in dtype or in whether they have a bias, those with a bias that is computed or written in place,
    those that the graph returns (Dynamo guards on strides, and the parts are views), and those that ``context.merge``
    refuses. Runs after ``rewrite_linear``, and before ``keep_views``, since the rows of a part are not contiguous.
    Inputs of the replaced products without other readers are removed.
    """
    memory = Memory(graph_module)
    groups: dict[tuple[Any, ...], list[tuple[fx.Node, LayerInfo]]] = {}
    for node, info in layer_nodes(graph_module):
        if node.target is ops.linear and not memory.returns(node):
            x, qparams, _, _, bias, dtype = node.args
            is_input = isinstance(bias, fx.Node) and bias.op == "placeholder" and not memory.is_written(bias)
            if bias is None or is_input:
                groups.setdefault((x, qparams, bias is None, dtype), []).append((node, info))
    merged = 0
    for members in groups.values():
        indices = tuple(_index(info) for _, info in members)
        if len(members) > 1 and context.merge(indices):
            _merge(graph_module, members, indices, context)
            merged += len(members)
    return merged


def _merge(
    graph_module: fx.GraphModule,
    members: list[tuple[fx.Node, LayerInfo]],
    indices: tuple[int, ...],
    context: PassContext,
) -> None:
    nodes = [node for node, _ in members]
    first = nodes[0]
    old_inputs = [node.args[i] for node in nodes for i in (2, 3)]
    weight = fx_utils.add_placeholder(graph_module, f"onlinequant_merged_weight_{indices[0]}")
    scale = fx_utils.add_placeholder(graph_module, f"onlinequant_merged_scale_{indices[0]}")
    context.extra_inputs += [("merged_weight", indices), ("merged_weight_scale", indices)]
    x, qparams, _, _, bias, dtype = first.args
    sizes = [info.weight_shape[0] for _, info in members]
    with graph_module.graph.inserting_before(first):
        if bias is not None:
            bias = graph_module.graph.call_function(torch.ops.aten.cat.default, ([node.args[4] for node in nodes],))
        args = (x, qparams, weight, scale, bias, dtype)
        product = graph_module.graph.call_function(ops.linear, args)
        parts = graph_module.graph.call_function(torch.ops.aten.split_with_sizes.default, (product, sizes, -1))
        for i, node in enumerate(nodes):
            part = graph_module.graph.call_function(operator.getitem, (parts, i))
            part.meta = {key: value for key, value in node.meta.items() if key != "onlinequant"}
            node.replace_all_uses_with(part)
    for node in nodes:
        graph_module.graph.erase_node(node)
    _drop(graph_module, old_inputs, context)


def _drop(graph_module: fx.GraphModule, inputs: list[Any], context: PassContext) -> None:
    """Remove inputs that rewriting appended and that have no readers any more."""
    names = [node.name for node in fx_utils.placeholders(graph_module)][-len(context.extra_inputs) :]
    gone = {node.name for node in inputs if not node.users}
    context.extra_inputs[:] = [
        extra for extra, name in zip(context.extra_inputs, names, strict=True) if name not in gone
    ]
    for node in inputs:
        if node.name in gone:
            graph_module.graph.erase_node(node)


def _index(info: LayerInfo) -> int:
    assert info.index is not None
    return info.index
