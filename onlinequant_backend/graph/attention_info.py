"""The record of an attention node for the passes, under ``node.meta["onlinequant"]`` like that of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.fx as fx

from .layer_info import LayerInfo, Measured, Sensitivity, info_of


@dataclasses.dataclass
class AttentionInfo(Measured):
    """An attention node, as the passes describe it. It has no weight, so nothing of it is calibrated: its operands are
    quantized with scales that its kernel finds.

    Attributes:
        name: fully qualified name of the module that calls it; a number follows from its second call on.
        input_shape: [batch, heads, queries, size], at the shapes that Dynamo traced.
        weight_shape: [batch, heads, tokens, size], of keys and values.
        output_shape: of its result, as that of the queries.
        flops: floating-point operations of both products, a multiply-add counting as two.
        bytes: size of queries, keys, values and output, each moved once.
        dtype: of all of these.
        is_possible: whether a kernel of this package can compute it; then its error is measured.
        is_candidate: whether options allow it, too.
        sensitivity: the error of its own output in 8 bit, once measured.
        float_us, quantized_us: microseconds by the best kernel of torch and by this package's, if measured.
        is_replaced: whether a kernel of this package computes it.
        quantized: whether that multiplies in 8 bit.
        reason: why, or why not.
    """

    name: str
    input_shape: tuple[int, ...] = ()
    weight_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    flops: int = 0
    bytes: int = 0
    dtype: torch.dtype = torch.float32
    is_possible: bool = False
    is_candidate: bool = False
    sensitivity: Sensitivity | None = None
    float_us: float | None = None
    quantized_us: float | None = None
    is_replaced: bool = False
    quantized: bool = False
    reason: str = "not decided yet"
    kind: str = dataclasses.field(default="attention", init=False)

    @property
    def is_short(self) -> bool:
        """Whether its kernel keeps whole sequences in registers, and multiplies in float."""
        return max(self.input_shape[-2], self.weight_shape[-2]) <= LONGEST_SHORT

    def refuse(self, reason: str) -> None:
        """Leave it in float."""
        self.is_candidate = self.is_replaced = self.quantized = False
        self.reason = reason


FAILED = "its 8-bit kernel does not run here"  # how the reason begins
LONGEST_SHORT = 64  # queries and tokens: see ``kernels.nvidia.short_attention``


def attention_of(node: fx.Node) -> AttentionInfo | None:
    """The node's attention, or None for any other node."""
    info = node.meta.get("onlinequant")
    return info if isinstance(info, AttentionInfo) else None


def attention_nodes(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, AttentionInfo]]:
    """Every attention node, in graph order; the graph may be changed while iterating."""
    for node in list(graph_module.graph.nodes):
        info = attention_of(node)
        if info is not None:
            yield node, info


def all_infos(graph_module: fx.GraphModule) -> list[LayerInfo | AttentionInfo]:
    """Of every layer and attention, in graph order."""
    found = (info_of(node) or attention_of(node) for node in graph_module.graph.nodes)
    return [info for info in found if info is not None]
