"""What the passes know about a conv or linear node: one dataclass under ``node.meta["onlinequant"]``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from onlinequant_backend import graph
from onlinequant_backend.config import QuantConfig
from onlinequant_backend.layers import Sensitivity
from onlinequant_backend.precision import Precision
from onlinequant_backend.report import NodeDecision

LINEAR_TARGETS = (torch._C._nn.linear, torch.nn.functional.linear)
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

# FLOPs per byte from which layers gain by 8 bit. A GPU waits for its memory until far more than a CPU.
_GPU_THRESHOLDS = {"conv": 100.0, "linear": 300.0}
_CPU_THRESHOLD = 20.0

# Tensor methods that a weight may pass through on its way into a layer.
CASTS = ("to", "float", "half", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """Stride, padding and dilation of a convolution, one integer for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


@dataclasses.dataclass
class LayerInfo:
    """A conv or linear node on its way through the passes.

    Attributes:
        name: fully qualified name of the layer.
        kind: "conv" or "linear".
        weight: name of the graph input that holds the weight; "" where the weight is not an input.
        input_shape, weight_shape, output_shape: sizes at the shapes that Dynamo traced.
        flops: floating-point operations of one call, a multiply-add counting as two.
        bytes: input, weight and output, each moved once, in their own dtypes.
        geometry: of a convolution that could be quantized, else None.
        index: position among the layers that could be quantized, which are observed; None for all others.
        sensitivity: error that 8 bit costs, once measured.
        dtype: of its output.
        float_us, quantized_us: microseconds in float and in 8 bit, where they were measured.
        quantized: whether it runs in 8 bit.
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

    @property
    def density(self) -> float:
        """Compute density in FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def error(self) -> float:
        """The relative error that 8 bit costs; infinite where it is not known."""
        relative = self.sensitivity.relative if self.sensitivity else math.inf
        return math.inf if math.isnan(relative) else relative

    def decision(self) -> NodeDecision:
        """What has been decided, as the report shows it."""
        return NodeDecision(
            name=self.name,
            kind=self.kind,
            shape=self.input_shape,
            weight_shape=self.weight_shape,
            flops=self.flops,
            bytes=self.bytes,
            density=self.density,
            sensitivity=self.sensitivity.relative if self.sensitivity else None,
            mae=self.sensitivity.mae if self.sensitivity else None,
            mse=self.sensitivity.mse if self.sensitivity else None,
            float_us=self.float_us,
            quantized_us=self.quantized_us,
            quantized=self.quantized,
            reason=self.reason,
        )


@dataclasses.dataclass
class PassContext:
    """What the passes are told, and what they hand on to each other.

    Attributes:
        config, precision: the user's options and what the device resolves them to.
        measured: whether the layers' sensitivities have been measured.
        unusable: by layer name, what observing found that rules a layer out.
        freed: indices of the layers whose float weight is gone, so that they must be in 8 bit.
        selection: indices of the layers to rewrite; None means all that are ``LayerInfo.quantized``.
        device: where the graph runs.
        at_largest: each of these layers, by name, at the largest size that its model was traced at.
        smoothing: what identifies the factors that a layer's input is smoothed by, by the layer's index, if it is.
        merge: makes one weight of those of several layers, by their indices; returns whether it could.
        extra_inputs: inputs that rewriting appended, in order: (what, index of the layer or indices of merged ones).
    """

    config: QuantConfig
    precision: Precision
    measured: bool = False
    unusable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    freed: Collection[int] = ()
    selection: Sequence[int] | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    at_largest: Callable[[Sequence[LayerInfo]], Mapping[str, LayerInfo]] = lambda infos: {}
    smoothing: Mapping[int, object] = dataclasses.field(default_factory=dict)
    merge: Callable[[tuple[int, ...]], bool] = lambda indices: False
    extra_inputs: list[tuple[str, int | tuple[int, ...]]] = dataclasses.field(default_factory=list)

    def threshold(self, kind: str) -> tuple[float, str]:
        """The density in FLOPs per byte below which a layer of this kind stays in float, and what that is called."""
        name = f"{kind}_compute_density_threshold"
        given = getattr(self.config, name)
        if given is not None:
            return given, f"{name}={given:g}"
        if self.measures_speed:
            return 0.0, "none"
        where, density = ("GPUs", _GPU_THRESHOLDS[kind]) if self.device.type == "cuda" else ("CPUs", _CPU_THRESHOLD)
        return density, f"{density:g}, the {name} for {where}"

    @property
    def measures_speed(self) -> bool:
        """Whether layers are selected by measured times, and by their compute density only where a threshold is set."""
        return self.device.type == "cuda" and self.config.selection != "density"

    @property
    def in_regions(self) -> bool:
        """Whether what the graph does more than once is to be compiled once."""
        asked = self.config.regional_compilation
        return self.device.type == "cpu" if asked == "auto" else bool(asked)

    @property
    def saturates(self) -> bool:
        """Whether converting to the activations' dtype limits them: in Triton's conversion to float8 the instruction
        does (PTX ``cvt.rn.satfinite.e4m3x2.f32``). Clamping before made Inductor's LayerNorm a third slower."""
        return self.device.type == "cuda" and self.precision.format.activation.is_floating_point


def info_of(node: fx.Node) -> LayerInfo | None:
    """The node's layer, or None for a node that is no conv or linear."""
    info = node.meta.get("onlinequant")
    return info if isinstance(info, LayerInfo) else None


def layer_nodes(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, LayerInfo]]:
    """Every named conv and linear node, in graph order; the graph may be changed while iterating."""
    for node in list(graph_module.graph.nodes):
        info = info_of(node)
        if info is not None:
            yield node, info


def layer_reads(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, LayerInfo, tuple[Any, int]]]:
    """Every layer with what it reads: layers of equal reads see the same values, so they can share a quantized copy.

    A read is the input's node and the number of in-place writes before it, any of which may have changed the input.
    """
    writes = 0
    for node in list(graph_module.graph.nodes):
        writes += graph.writes_in_place(node)
        info = info_of(node)
        if info is not None:
            yield node, info, (graph.argument(node, 0, "input"), writes)


def is_selected(info: LayerInfo, context: PassContext) -> bool:
    """Whether to rewrite this layer."""
    if info.index is None:
        return False
    return info.quantized if context.selection is None else info.index in context.selection


def weight_parameter(node: fx.Node) -> fx.Node | None:
    """The parameter input behind a layer's weight, looking through dtype casts; None if it is computed."""
    weight = graph.argument(node, 1, "weight")
    while isinstance(weight, fx.Node) and weight.op == "call_method" and weight.target in CASTS:
        weight = weight.args[0]
    return weight if graph.is_parameter(weight) else None
