from __future__ import annotations

import torch
import torch.fx as fx

from onlinequant_backend.graph.aliasing import Memory
from onlinequant_backend.torch_internals import dynamo_interface

from .context import PassContext
from .keep_output_layout import in_float_layout

_IS_KEPT = "has_kept_views"  # in a node's ``meta``


def keep_views(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Keep views of 8-bit layers' results possible where necessary: these layers may write another memory layout.

    Before::

        %conv = call_function[target=onlinequant.conv](args = (%x, ...))
        %flatten = call_method[target=flatten](args = (%conv, 2))
        %add_ = call_method[target=add_](args = (%flatten, 1))
        %conv_1 = call_function[target=onlinequant.conv](args = (%conv, ...))
        %view = call_method[target=view](args = (%conv_1, 1, -1))

    After, where ``%flatten`` would have been a copy, and ``%view`` impossible::

        %conv = call_function[target=onlinequant.conv](args = (%x, ...))
        %contiguous = call_function[target=aten.contiguous](args = (%conv,), kwargs = {memory_format: contiguous})
        %flatten = call_method[target=flatten](args = (%contiguous, 2))
        %add_ = call_method[target=add_](args = (%flatten, 1))
        %conv_1 = call_function[target=onlinequant.conv](args = (%contiguous, ...))
        %reshape = call_method[target=reshape](args = (%conv_1, 1, -1))

    The same is done for results that the graph returns as several tensors in the same memory. Does not change tensors
    that are written in place and have the same shape in all aliases, such as those that an activation was written into.
    """
    memory = Memory(graph_module)
    changed = 0
    for node in list(graph_module.graph.nodes):
        if memory.is_written(node) or memory.returns(node) > 1:
            if _is_made_here(node, memory) and _has_views(node, memory) and not node.meta.get(_IS_KEPT):
                node.meta[_IS_KEPT] = True
                changed += in_float_layout(graph_module, node, node.next) is not None
        elif node.op == "call_method" and node.target == "view" and _has_sizes(node):
            node.target = "reshape"
            changed += 1
    return changed


def _is_made_here(node: fx.Node, memory: Memory) -> bool:
    return node.op.startswith("call") and memory.owners(node)[0] is node


def _has_views(node: fx.Node, memory: Memory) -> bool:
    """Whether the memory of ``node`` has views that another memory layout would change."""
    return memory.returns(node) > 1 or len({_shape(owner) for owner in memory.owners(node)}) > 1


def _shape(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(tuple(map(dynamo_interface.hint, numbers)) for numbers in (value.shape, value.stride()))


def _has_sizes(view: fx.Node) -> bool:
    """Whether a ``view`` call is given sizes rather than a dtype."""
    return len(view.args) > 1 and not isinstance(view.args[1], torch.dtype)
