"""Specializes a graph for the sizes and numbers of one call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_leaves

from ..torch_internals import dynamo_interface
from .fx_utils import placeholders


def specialize(graph_module: fx.GraphModule, arguments: Sequence[Any], *, sizes: bool = True) -> None:
    """Bake the numbers among a call's ``arguments`` into the graph, so that it has only concrete shapes.

    These are symbolic sizes (Python ints at run time), unless ``sizes`` is False, and, under ``dynamic=True``, Python
    floats, which Dynamo passes as 0-d float64 tensors that are only read by ``.item()``.
    """
    for node, value in zip(placeholders(graph_module), arguments, strict=True):
        if isinstance(value, float) or (isinstance(value, int) and sizes):
            _replace_by_number(node, value)
            node.meta["example_value"] = value  # no longer a symbol
        elif is_wrapped_float(node):
            stays = is_open_float(node)
            for user in list(node.users):
                if stays:
                    user.replace_all_uses_with(node)
                else:
                    _replace_by_number(user, float(value))
                graph_module.graph.erase_node(user)
            if stays:
                _multiply_what_it_fills(node)


def is_wrapped_float(node: fx.Node) -> bool:
    """Whether an input is a Python float that Dynamo wrapped in a 0-d float64 tensor."""
    value = node.meta.get("example_value")
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 0
        and value.dtype is torch.float64
        and "tensor_dict" not in node.meta
        and bool(node.users)
        and all(user.op == "call_method" and user.target == "item" for user in node.users)
    )


_ARITHMETIC = frozenset([operator.mul, operator.truediv, operator.add, operator.sub, operator.neg])


def is_open_float(node: fx.Node) -> bool:
    """Whether a wrapped float, such as a LoRA's strength, is only used in arithmetic, so that it can stay an input."""
    return is_wrapped_float(node) and all(map(_is_calculated_with, node.users))


def _is_calculated_with(number: fx.Node) -> bool:
    """Whether a 0-d float64 tensor gives the same result as the Python float ``number``: it does not promote a
    floating-point tensor's dtype, unless that has no dimensions itself."""
    for user in number.users:
        if _is_filled_with(user, number):
            continue
        if user.op != "call_function" or user.target not in _ARITHMETIC:
            return False
        tensors = [x for x in map(_value, user.all_input_nodes) if isinstance(x, torch.Tensor)]
        if not (all(x.is_floating_point() and x.dim() for x in tensors) if tensors else _is_calculated_with(user)):
            return False
    return True


def _is_filled_with(user: fx.Node, number: fx.Node) -> bool:
    """Whether a call fills a floating-point tensor with ``number``, as for a time step."""
    value = _value(user)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or len(user.all_input_nodes) > 2:
        return False
    if user.target is dynamo_interface.tensor_of_numbers:
        return all(leaf is number for leaf in tree_leaves(user.args[0]))
    place = {torch.full: 1, torch.full_like: 1, "new_full": 2}.get(user.target)
    return place is not None and value.dim() > 0 and len(user.args) > place and user.args[place] is number


def _multiply_what_it_fills(number: fx.Node) -> None:
    """Replace tensors filled with ``number``, which is a tensor now, by its product with ones."""
    for user in list(number.users):
        if _is_filled_with(user, number):
            user.replace_all_uses_with(_ones_times(user, number))
            user.graph.erase_node(user)
        elif not isinstance(_value(user), torch.Tensor):
            _multiply_what_it_fills(user)


def _ones_times(filled: fx.Node, number: fx.Node) -> fx.Node:
    graph, value = filled.graph, _value(filled)
    with graph.inserting_before(filled):
        if filled.target is dynamo_interface.tensor_of_numbers:
            # With at least one dimension, else the product would have the number's dtype.
            kwargs = {"dtype": value.dtype, "device": value.device}
            ones = graph.call_function(torch.ones, (tuple(value.shape) or (1,),), kwargs)
            ones.meta["example_value"] = value if value.dim() else value[None]
        else:
            ones = graph.node_copy(filled, lambda node: node)
            _replace_in(ones, number, 1.0)
        product = graph.call_function(torch.mul, (ones, number))
        product.meta["example_value"] = _value(ones)
        if value.dim():
            return product
        result = graph.call_function(torch.reshape, (product, ()))
        result.meta["example_value"] = value
        return result


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _replace_by_number(node: fx.Node, number: float) -> None:
    for user in list(node.users):
        _replace_in(user, node, number)


def _replace_in(user: fx.Node, node: fx.Node, number: float) -> None:
    def replace(argument: fx.Node) -> Any:
        return number if argument is node else argument

    user.args = fx.map_arg(user.args, replace)
    user.kwargs = fx.map_arg(user.kwargs, replace)
