from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from onlinequant_backend import exclusion
from onlinequant_backend.graph import AttentionInfo, fx_utils
from onlinequant_backend.graph.attention_info import all_infos, attention_of
from onlinequant_backend.report.report import CANDIDATE
from onlinequant_backend.torch_internals import dynamo_interface

from .context import PassContext
from .name_layers import module_name

LARGEST_HEAD = 256
# The arguments of ``scaled_dot_product_attention`` after queries, keys and values, with those that kernels know.
_ARGUMENTS: tuple[tuple[int, str, Any], ...] = (
    (3, "attn_mask", None),
    (4, "dropout_p", 0.0),
    (5, "is_causal", False),
    (7, "enable_gqa", False),
)


def find_attention(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Mark every attention node with an ``AttentionInfo``: its name, shapes, FLOPs and bytes, whether a kernel of this
    package can compute it, and if not, or if options forbid it, why it stays in float.

    Before::

        %attention = call_function[target=scaled_dot_product_attention](args = (%query, %key, %value), ...)

    After: the same, with ``meta["onlinequant"] = AttentionInfo("down_blocks.1.attentions.0...attn1", ...)``.

    For queries [B, H, N, D] and keys [B, H, T, D], ``flops = 4 B H N T D``. Does not change nodes that are marked.
    """
    names = {info.name for info in all_infos(graph_module)}
    found: dict[fx.Node, AttentionInfo] = {}
    for node in graph_module.graph.nodes:
        if node.target is F.scaled_dot_product_attention and attention_of(node) is None:
            info = AttentionInfo(_unused(module_name(node), names))
            names.add(info.name)
            _describe(node, info)
            node.meta["onlinequant"] = found[node] = info
    largest = context.at_largest(list(found.values())) if found else {}
    for node, info in found.items():
        known = largest.get(info.name)
        if isinstance(known, AttentionInfo) and not fx_utils.is_concrete(node.meta.get("example_value")):
            _take_sizes(info, known)
        impossible = _lacks_kernel(context, info) or _impossible(node, info)
        refusal = impossible or _refused_by_options(info, context)
        info.is_possible = impossible is None
        info.is_candidate = info.quantized = refusal is None
        info.reason = refusal or CANDIDATE
    return len(found)


def _unused(name: str, names: set[str]) -> str:
    number = 2
    found = name
    while found in names:
        found, number = f"{name}.{number}", number + 1
    return found


def _operands(node: fx.Node) -> list[torch.Tensor | None]:
    """Queries, keys, values and the result, as Dynamo traced them."""
    nodes = [fx_utils.argument(node, at, name) for at, name in enumerate(("query", "key", "value"))]
    values = [each.meta.get("example_value") if isinstance(each, fx.Node) else None for each in (*nodes, node)]
    return [value if isinstance(value, torch.Tensor) else None for value in values]


def _describe(node: fx.Node, info: AttentionInfo) -> None:
    q, k, v, y = _operands(node)
    if q is None or k is None or v is None or y is None:
        return
    info.input_shape, info.weight_shape, info.output_shape = (_shape(tensor) for tensor in (q, k, y))
    info.dtype = y.dtype
    info.flops = 4 * math.prod(info.input_shape) * math.prod(info.weight_shape[-2:-1])
    info.bytes = sum(math.prod(_shape(tensor)) * tensor.element_size() for tensor in (q, k, v, y))


def _take_sizes(info: AttentionInfo, known: AttentionInfo) -> None:
    """Describe attention at the largest size that it was traced at."""
    if info.input_shape[1::2] == known.input_shape[1::2] and info.dtype == known.dtype:
        for name in ("input_shape", "weight_shape", "output_shape", "flops", "bytes"):
            setattr(info, name, getattr(known, name))


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(dynamo_interface.hint(size) for size in tensor.shape)


def _impossible(node: fx.Node, info: AttentionInfo) -> str | None:
    """Why no kernel of this package can replace the node; None if one can."""
    q, k, v, y = _operands(node)
    if q is None or k is None or v is None or y is None:
        return "its shapes are not known"
    for at, name, known in _ARGUMENTS:
        given = fx_utils.argument(node, at, name, known)
        if given is not known and given != known:
            return f"there is no 8-bit kernel for {name}"
    if isinstance(fx_utils.argument(node, 6, "scale"), fx.Node):
        return "its scale is computed in the graph"
    if q.dim() != 4:
        return "its operands are not [batch, heads, tokens, size]"
    queries, keys, values = (tuple(map(str, tensor.shape)) for tensor in (q, k, v))  # adds no guard
    if keys != values or queries[:2] != keys[:2] or queries[3] != keys[3]:
        return "its queries, keys and values differ in batch, heads or size"
    if not all(isinstance(size, int) for size in (q.shape[1], q.shape[3])):
        return "its number of heads or their size is not fixed"
    if info.is_short and not all(isinstance(tensor.shape[2], int) for tensor in (q, k)):
        return "its sequences are short, and their length varies"
    if q.shape[3] > LARGEST_HEAD:
        return f"its heads are larger than {LARGEST_HEAD}"
    if not info.flops:
        return "it computes nothing"
    if len({tensor.dtype for tensor in (q, k, v, y)}) > 1:
        return "its operands and its result differ in dtype"
    return None


def _lacks_kernel(context: PassContext, info: AttentionInfo) -> str | None:
    if context.precision.name == "float":
        return f"float: {context.precision.reason}"
    dtypes = context.kernels.attention_dtypes
    if not dtypes:
        return f"{context.kernels.devices} have no 8-bit kernel for attention"
    return None if info.dtype in dtypes else f"{context.kernels.devices} have no kernel for attention in {info.dtype}"


def _refused_by_options(info: AttentionInfo, context: PassContext) -> str | None:
    if context.config.quantized_attention_percentage == 0 and not info.is_short:
        return "quantized_attention_percentage is 0"
    if context.config.max_error is not None and not info.is_short:
        return "max_error decides about convolutions and linear layers only"
    pattern = exclusion.matching(info.name, context.config.exclude)
    return None if pattern is None else f"excluded by {pattern!r}"
