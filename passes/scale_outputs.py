from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from onlinequant_backend.graph import fx_utils
from onlinequant_backend.graph.layer_info import LINEAR_TARGETS, is_cast

from .context import PassContext

IS_SCALING = "scales_a_layers_output"  # in the ``meta`` of what this pass puts after a layer

_MULTIPLICATIONS = (operator.mul, torch.mul)
# In float16 a product with values of float8, up to 448, may be infinite before it is scaled.
_WIDE = (torch.float32, torch.bfloat16)


def scale_outputs(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Multiply the outputs of linear layers by scales that the graph multiplies their 8-bit weights by.

    Before::

        %to = call_method[target=to](args = (%w, torch.bfloat16))
        %mul = call_function[target=operator.mul](args = (%to, %scale))
        %linear = call_function[target=torch._C._nn.linear](args = (%x, %mul, %b))

    After::

        %to = call_method[target=to](args = (%w, torch.bfloat16))
        %linear = call_function[target=torch._C._nn.linear](args = (%x, %to))
        %mul = call_function[target=torch.mul](args = (%linear, %scale))
        %add = call_function[target=torch.add](args = (%mul, %b))

    So the layer's weight is a parameter that can be quantized, and a scale takes effect however it changes. Does not
    change layers whose weight has more than 8 bits, scales other than one number or one for each output channel, and
    outputs in float16, which might not hold what is not scaled yet.
    """
    changed = 0
    for node in list(graph_module.graph.nodes):
        parts = _parts(node) if node.target in LINEAR_TARGETS else None
        if parts is not None:
            _rewrite(graph_module, node, *parts)
            changed += 1
    return changed


def _parts(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """The 8-bit weight, cast, and the scale that a linear layer's weight is the product of; None if it is not."""
    product = fx_utils.argument(node, 1, "weight")
    while is_cast(product):
        product = product.args[0]
    if not isinstance(product, fx.Node) or product.target not in _MULTIPLICATIONS or product.kwargs:
        return None
    for weight, scale in (product.args, reversed(product.args)):
        if isinstance(weight, fx.Node) and _is_8_bit_parameter(weight) and _fits(node, weight, scale):
            return weight, scale
    return None


def _is_8_bit_parameter(weight: fx.Node) -> bool:
    source: Any = weight
    while is_cast(source):
        source = source.args[0]
    return fx_utils.is_parameter(source) and fx_utils.example(source).dtype.itemsize == 1


def _fits(node: fx.Node, weight: fx.Node, scale: Any) -> bool:
    """Whether the output may be scaled in place of the weight, a matrix."""
    if fx_utils.example(node).dtype not in _WIDE or fx_utils.example(weight).dtype not in _WIDE:
        return False
    if isinstance(scale, (int, float)):
        return True
    if not isinstance(scale, fx.Node) or not isinstance(scale.meta.get("example_value"), torch.Tensor):
        return False
    rows, shape = fx_utils.example(weight).shape[0], fx_utils.example(scale).shape
    is_floating = fx_utils.example(scale).dtype.is_floating_point
    return is_floating and len(shape) <= 2 and (all(size == 1 for size in shape) or tuple(shape) == (rows, 1))


def _rewrite(graph_module: fx.GraphModule, node: fx.Node, weight: fx.Node, scale: Any) -> None:
    graph, dtype = graph_module.graph, fx_utils.example(node).dtype
    x, product, bias = (fx_utils.argument(node, *each) for each in ((0, "input"), (1, "weight"), (2, "bias")))
    with graph.inserting_before(node):
        if fx_utils.example(weight).dtype != fx_utils.example(product).dtype:
            weight = _call(graph, "to", weight, fx_utils.example(product).dtype)
        result = graph.create_node("call_function", node.target, (x, weight))
        result.meta = dict(node.meta)
        if isinstance(scale, fx.Node) and fx_utils.example(scale).dim():
            scale = _call(graph, "reshape", scale, -1)
        result = _call(graph, torch.mul, result, scale)
        if bias is not None:
            result = _call(graph, torch.add, result, bias)
        result = _call(graph, "to", result, dtype)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    while not product.users and product.op != "placeholder":  # it is as large as the weight in float
        product, unused = product.args[0], product
        graph.erase_node(unused)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call, with the value that it would have had in Dynamo's trace."""
    values = [fx_utils.example(each) if isinstance(each, fx.Node) else each for each in args]
    if isinstance(target, str):
        call = graph.call_method(target, args)
        call.meta["example_value"] = getattr(values[0], target)(*values[1:])
    else:
        call = graph.call_function(target, args)
        call.meta["example_value"] = target(*values)
    call.meta[IS_SCALING] = True
    return call
