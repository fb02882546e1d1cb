from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils
from onlinequant_backend.torch_internals import dynamo_interface

from .context import PassContext

_ADDS = (operator.add, torch.add)
# A row is held in registers.
_MAX_CHANNELS = 16384


def fuse_layer_norm(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Add a residual, normalize and quantize in one kernel.

    Before::

        %add = call_function[target=operator.add](args = (%x, %residual))
        %layer_norm = call_function[target=torch.nn.functional.layer_norm](args = (%add, (640,), %w, %b, 1e-05))
        %quantize = call_function[target=onlinequant.quantize](
            args = (%layer_norm, %qparams, torch.float8_e4m3fn, False))

    After::

        %both = call_function[target=onlinequant.layer_norm](
            args = (%x, %residual, %w, %b, 1e-05, %qparams, torch.float8_e4m3fn))
        %add = call_function[target=operator.getitem](args = (%both, 0))
        %quantize = call_function[target=operator.getitem](args = (%both, 1))

    Inductor's kernels for this took two to three times as long in SDXL's step on an H200. Without a preceding add the
    residual is None. Does not change norms over more than the last dimension, of very wide rows, or whose result has
    other readers, and formats without such a kernel. Runs after ``rewrite_linear``.
    """
    if not context.has_kernel("layer_norm"):
        return 0
    fused = 0
    hoist = not any(map(fx_utils.writes_in_place, graph_module.graph.nodes))
    for norm in list(graph_module.graph.nodes):
        quantize = _quantize_after(norm) if norm.target is torch.nn.functional.layer_norm else None
        if quantize is not None:
            _fuse(graph_module, norm, quantize, hoist)
            fused += 1
    return fused


def _quantize_after(norm: fx.Node) -> fx.Node | None:
    """The quantize node that is the only reader of a LayerNorm over the last dimension."""
    quantize = next(iter(norm.users)) if len(norm.users) == 1 else None
    if quantize is None or quantize.target is not ops.quantize or quantize.args[3]:
        return None
    x, shape = fx_utils.argument(norm, 0, "input"), fx_utils.argument(norm, 1, "normalized_shape")
    value = x.meta.get("example_value")
    fits = (
        isinstance(value, torch.Tensor) and len(shape) == 1 and dynamo_interface.hint(value.shape[-1]) <= _MAX_CHANNELS
    )
    return quantize if fits and value.dtype == fx_utils.example(norm).dtype else None


def _fuse(graph_module: fx.GraphModule, norm: fx.Node, quantize: fx.Node, hoist: bool) -> None:
    x = fx_utils.argument(norm, 0, "input")
    # In a graph with in-place writes, the sum may have changed by the time the norm reads it.
    terms = _terms(x) if hoist else None
    weight, bias = fx_utils.argument(norm, 2, "weight"), fx_utils.argument(norm, 3, "bias")
    eps = fx_utils.argument(norm, 4, "eps", 1e-5)
    _, qparams, dtype = quantize.args[:3]
    # At the sum's position, since it may have readers before the norm.
    with graph_module.graph.inserting_before(norm if terms is None else x):
        first, second = terms or (x, None)
        args = (first, second, weight, bias, eps, qparams, dtype)
        both = graph_module.graph.call_function(ops.layer_norm, args)
        total, normalized = (graph_module.graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
    normalized.meta = {key: value for key, value in quantize.meta.items() if key != "onlinequant"}
    quantize.replace_all_uses_with(normalized)
    graph_module.graph.erase_node(quantize)
    graph_module.graph.erase_node(norm)
    if terms is None:
        graph_module.graph.erase_node(total)
    else:
        total.meta = dict(x.meta)
        x.replace_all_uses_with(total)
        graph_module.graph.erase_node(x)


def _terms(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of equal shape and dtype whose sum ``node`` is."""
    if node.target not in _ADDS or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    values = [value.meta.get("example_value") for value in (a, b, node)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    kinds = {(tuple(dynamo_interface.hint(size) for size in tensor.shape), tensor.dtype) for tensor in tensors}
    return (a, b) if len(tensors) == 3 and len(kinds) == 1 else None
