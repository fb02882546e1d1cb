"""The choice of the attention of a graph that this package's kernels compute, made after observing."""

from __future__ import annotations

from collections.abc import Mapping

import torch.fx as fx

from ..graph import AttentionInfo, layer_nodes
from ..graph.attention_info import attention_nodes
from ..passes import PassContext
from ..passes.select_nodes import beyond_percentage


def choose_attention(graph_module: fx.GraphModule, context: PassContext, slow: Mapping[str, str]) -> None:
    """Decide for all attention that options allow, unless no other layer is in 8 bit. In this order: by times, or by
    compute density where none are measured, then by ``quantized_attention_percentage``, least sensitive first.
    ``slow``: by name, why a kernel of this package gains too little.
    """
    chosen = list[AttentionInfo]()
    alone = None if any(info.quantized for _, info in layer_nodes(graph_module)) else "no other layer is in 8 bit"
    for _, info in attention_nodes(graph_module):
        if not info.is_candidate:
            continue
        refusal = alone or slow.get(info.name) or _unknown_or_thin(info, context)
        info.is_replaced = refusal is None
        info.quantized = refusal is None and not info.is_short
        info.reason = refusal or ("selected" if info.quantized else _in_float(info))
        if info.quantized:
            chosen.append(info)
    option = "quantized_attention_percentage"
    for info, rank in beyond_percentage(chosen, option, context.config.quantized_attention_percentage):
        info.is_replaced = info.quantized = False
        info.reason = f"sensitivity {_said(info)} {rank}"


def _unknown_or_thin(info: AttentionInfo, context: PassContext) -> str | None:
    if context.measures_speed:
        return "there was no memory to time it" if info.float_us is None else None
    least = context.kernels.least_density("attention")
    return f"density {info.density:.4g} is below {least:g}" if info.density < least else None


def _in_float(info: AttentionInfo) -> str:
    times = "" if info.quantized_us is None else f": {info.quantized_us:.1f} us, {info.float_us:.1f} us by torch"
    return f"in float, by a kernel for short sequences{times}"


def _said(info: AttentionInfo) -> str:
    return "not measured," if info.sensitivity is None else f"{info.sensitivity.relative:.3g}"
