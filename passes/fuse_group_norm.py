from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils
from onlinequant_backend.tensors import CHANNELS_LAST

from .context import PassContext

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Ops that only reorder elements, with any memory layout.
_ORDERINGS = ("contiguous", "flatten", "movedim", "permute", "reshape", "transpose")
_ORDERING_FUNCTIONS = (torch.flatten, torch.movedim, torch.permute, torch.reshape, torch.transpose)


def fuse_group_norm(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Fuse GroupNorm, SiLU and quantization into this package's kernels, which read and write channels last.

    Before::

        %norm = call_function[target=torch.nn.functional.group_norm](args = (%x, 32, %w, %b, 1e-05))
        %silu = call_function[target=torch.nn.functional.silu](args = (%norm,), kwargs = {inplace: False})
        %quantize = call_function[target=onlinequant.quantize](
            args = (%silu, %qparams, torch.float8_e4m3fn, True, False))

    After::

        %contiguous = call_function[target=aten.contiguous](
            args = (%x,), kwargs = {memory_format: torch.channels_last})
        %norm = call_function[target=onlinequant.group_norm](
            args = (%contiguous, 32, %w, %b, 1e-05, True, %qparams, torch.float8_e4m3fn))

    Inductor's kernels for channels-last tensors take several times as long. Before a linear layer, the ops that turn
    the image into rows (``permute(0, 2, 3, 1)`` and ``reshape``) are moved after the fused op, where they copy nothing.
    Does not change norms if any intermediate result has other readers, norms of other dimensions than those of images
    or videos, and formats without such a kernel. Runs after ``rewrite_linear``, ``rewrite_conv`` and
    ``drop_identities``.
    """
    if not context.has_kernel("group_norm"):
        return 0
    fused = 0
    for norm in list(graph_module.graph.nodes):
        if norm.target is torch.nn.functional.group_norm and _has_kernel(norm):
            fused += _fuse(graph_module, norm)
    return fused


def _has_kernel(norm: fx.Node) -> bool:
    x, groups = fx_utils.argument(norm, 0, "input"), fx_utils.argument(norm, 1, "num_groups")
    value = x.meta.get("example_value")
    return (
        isinstance(value, torch.Tensor)
        and value.dim() in CHANNELS_LAST
        and value.dtype in _DTYPES
        and isinstance(groups, int)
        and isinstance(fx_utils.argument(norm, 4, "eps", 1e-5), (int, float))
    )


def _fuse(graph_module: fx.GraphModule, norm: fx.Node) -> bool:
    """Fuse ``norm`` with its chain of only readers, if that ends in a quantize node."""
    user = _only_user(norm)
    silu = user is not None and user.target is torch.nn.functional.silu
    last = user if user is not None and silu else norm
    orderings: list[fx.Node] = []
    quantize = _only_user(last)
    while quantize is not None and _is_ordering(quantize):
        orderings.append(quantize)
        quantize = _only_user(quantize)
    if quantize is None or quantize.target is not ops.quantize or (orderings and quantize.args[3]):
        return False
    _, qparams, dtype, channels_last = quantize.args[:4]
    assert isinstance(dtype, torch.dtype)
    x, groups = fx_utils.argument(norm, 0, "input"), fx_utils.argument(norm, 1, "num_groups")
    weight, bias = fx_utils.argument(norm, 2, "weight"), fx_utils.argument(norm, 3, "bias")
    eps = fx_utils.argument(norm, 4, "eps", 1e-5)
    # At the norm's position, since x may be written in place before the result is quantized.
    with graph_module.graph.inserting_before(norm):
        # In the graph, so that Inductor has the producer of x write this layout.
        layout: dict[str, Any] = {"memory_format": CHANNELS_LAST[fx_utils.example(x).dim()]}
        x = graph_module.graph.call_function(torch.ops.aten.contiguous.default, (x,), layout)
        args = (x, groups, weight, bias, eps, silu, qparams, dtype)
        result = graph_module.graph.call_function(ops.group_norm, args)
    result.meta = {key: value for key, value in quantize.meta.items() if key != "onlinequant"}
    # AOTAutograd caches only graphs in which methods are called on nodes with an example value.
    result.meta["example_value"] = fx_utils.example(norm).to(dtype)
    if orderings:
        orderings[0].replace_input_with(last, result)
        result = orderings[-1]
        for node in orderings:
            node.meta["example_value"] = fx_utils.example(node).to(dtype)
    if not channels_last:
        with graph_module.graph.inserting_before(quantize):
            result = graph_module.graph.call_function(torch.ops.aten.contiguous.default, (result,))
    quantize.replace_all_uses_with(result)
    graph_module.graph.erase_node(quantize)
    if silu:
        graph_module.graph.erase_node(last)
    graph_module.graph.erase_node(norm)
    return True


def _is_ordering(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target in _ORDERINGS) or node.target in _ORDERING_FUNCTIONS


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
