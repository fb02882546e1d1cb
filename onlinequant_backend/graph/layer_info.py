"""The record of a conv or linear node for the passes: one dataclass under ``node.meta["onlinequant"]``."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from . import fx_utils
from .conv_geometry import ConvGeometry

LINEAR_TARGETS = (torch.nn.functional.linear,)
CONV_TARGETS = (
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.nn.functional.conv1d,
    torch.nn.functional.conv2d,
    torch.nn.functional.conv3d,
)
TRANSPOSED_TARGETS = (
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    torch.nn.functional.conv_transpose1d,
    torch.nn.functional.conv_transpose2d,
    torch.nn.functional.conv_transpose3d,
)


# Tensor methods that a weight may pass through on its way into a layer.
CASTS = ("to", "float", "half", "bfloat16", "dequantize")


class Measured:
    """What follows from the numbers of a layer or attention."""

    flops: int
    bytes: int
    sensitivity: Sensitivity | None

    @property
    def density(self) -> float:
        """Compute density in FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def error(self) -> float:
        """The relative error of quantizing the layer; infinite if not known."""
        relative = self.sensitivity.relative if self.sensitivity else math.inf
        return math.inf if math.isnan(relative) else relative


@dataclasses.dataclass
class LayerInfo(Measured):
    """A conv or linear node, as the passes describe it.

    Attributes:
        name: fully qualified name of the layer.
        kind: "conv" or "linear".
        weight: name of the graph input that holds the weight; "" if the weight is not an input.
        input_shape, weight_shape, output_shape: sizes at the shapes that Dynamo traced.
        flops: floating-point operations of one call, a multiply-add counting as two.
        bytes: size of input, weight and output, each moved once, in their own dtypes.
        geometry: of a convolution that could be quantized, else None.
        index: position among the layers that could be quantized, which are observed; None for all others.
        sensitivity: the error of quantizing the layer, once measured.
        dtype: of its output.
        float_us, quantized_us: microseconds in float and quantized, if measured.
        quantized: whether it is quantized.
        reason: why, or why not.
    """

    name: str
    kind: str
    weight: str = ""
    input_shape: tuple[int, ...] = ()
    weight_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    flops: int = 0
    bytes: int = 0
    geometry: ConvGeometry | None = None
    index: int | None = None
    sensitivity: Sensitivity | None = None
    dtype: torch.dtype = torch.float32
    float_us: float | None = None
    quantized_us: float | None = None
    quantized: bool = False
    reason: str = "not decided yet"


def info_of(node: fx.Node) -> LayerInfo | None:
    """The node's layer, or None for a node that is neither conv nor linear."""
    info = node.meta.get("onlinequant")
    return info if isinstance(info, LayerInfo) else None


def layer_nodes(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, LayerInfo]]:
    """Every named conv and linear node, in graph order; the graph may be changed while iterating."""
    for node in list(graph_module.graph.nodes):
        info = info_of(node)
        if info is not None:
            yield node, info


def layer_reads(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, LayerInfo, tuple[Any, int]]]:
    """Every layer with its read: layers with equal reads have the same input values, so they can share a quantized
    copy. A read is the input's node and the number of earlier in-place writes, any of which may have changed the input.
    """
    writes = 0
    for node in list(graph_module.graph.nodes):
        writes += fx_utils.writes_in_place(node)
        info = info_of(node)
        if info is not None:
            yield node, info, (fx_utils.argument(node, 0, "input"), writes)


def weight_parameter(node: fx.Node) -> fx.Node | None:
    """The parameter input behind a layer's weight, looking through dtype casts; None if it is computed."""
    weight = fx_utils.argument(node, 1, "weight")
    while is_cast(weight):
        weight = weight.args[0]
    return weight if fx_utils.is_parameter(weight) else None


def weight_reader(node: fx.Node) -> fx.Node:
    """The node that reads a layer's ``weight_parameter``: the layer itself, or the first cast on the way to it."""
    reader, weight = node, fx_utils.argument(node, 1, "weight")
    while is_cast(weight):
        reader, weight = weight, weight.args[0]
    return reader


def is_cast(node: Any) -> bool:
    """Whether a node is a tensor in another dtype, device or memory format, as far as methods do that."""
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in CASTS


@dataclasses.dataclass
class Sensitivity:
    """The error of an output with one layer quantized: ``mae``, ``mse``, and ``relative`` to the float output.
    ``of_model``: whether it is the model's output rather than the layer's own.
    """

    relative: float
    mae: float
    mse: float
    of_model: bool = False

    def __post_init__(self) -> None:
        # Rounded as in the cache, so that decisions do not depend on whether a value was measured or loaded.
        self.relative, self.mae, self.mse = (ctypes.c_float(x).value for x in (self.relative, self.mae, self.mse))
