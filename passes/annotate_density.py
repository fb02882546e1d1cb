from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx

from onlinequant_backend.graph import fx_utils
from onlinequant_backend.graph.layer_info import CONV_TARGETS, LINEAR_TARGETS, LayerInfo, layer_nodes
from onlinequant_backend.torch_internals import dynamo_interface

from .context import PassContext


def annotate_density(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Write shapes, FLOPs and bytes into every layer's ``LayerInfo``, from the shapes that Dynamo traced.

    Before: ``LayerInfo(name, kind, flops=0, bytes=0)``. After, for y = x @ w.T with x [M, K] and w [N, K]:
    ``flops = 2 M N K`` and ``bytes = M K + N K + M N`` elements, each times the size of its dtype.

    For a graph with symbolic sizes these are the largest shapes that its model was traced at. PyTorch's flop counter
    cannot be used: it does not know 8-bit products. Does not change layers that are annotated already.
    """
    changed = 0
    for node, info in layer_nodes(graph_module):
        if info.output_shape:
            continue
        x, weight = (_example(fx_utils.argument(node, i, name)) for i, name in ((0, "input"), (1, "weight")))
        y = _example(node)
        if x is None or weight is None or y is None:
            info.reason = "its shapes are not known"
            continue
        info.input_shape, info.weight_shape, info.output_shape = (_shape(tensor) for tensor in (x, weight, y))
        info.dtype = y.dtype
        info.flops = _flops(node, info)
        info.bytes = sum(math.prod(_shape(tensor)) * tensor.element_size() for tensor in (x, weight, y))
        changed += 1
    largest = context.at_largest([info for _, info in layer_nodes(graph_module)]) if changed else {}
    for node, info in layer_nodes(graph_module):
        known, is_fixed = largest.get(info.name), fx_utils.is_concrete(node.meta.get("example_value"))
        if isinstance(known, LayerInfo) and not is_fixed and _is_alike(known, info):
            for name in ("input_shape", "output_shape", "flops", "bytes"):
                setattr(info, name, getattr(known, name))
    return changed


def _is_alike(one: LayerInfo, other: LayerInfo) -> bool:
    return (one.kind, one.weight_shape, one.dtype) == (other.kind, other.weight_shape, other.dtype)


def _flops(node: fx.Node, info: LayerInfo) -> int:
    taps = math.prod(info.weight_shape[1:])
    if node.target in LINEAR_TARGETS or node.target in CONV_TARGETS:
        # Each output element is a dot product over one output channel's weights.
        return 2 * math.prod(info.output_shape) * taps
    # Transposed: each input element is multiplied into every tap.
    return 2 * math.prod(info.input_shape) * taps


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(dynamo_interface.hint(size) for size in tensor.shape)


def _example(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else node
    return value if isinstance(value, torch.Tensor) else None
