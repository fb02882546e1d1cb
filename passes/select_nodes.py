from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.fx as fx

from onlinequant_backend import exclusion
from onlinequant_backend.graph import fx_utils
from onlinequant_backend.graph.aliasing import Memory
from onlinequant_backend.graph.conv_geometry import ConvGeometry
from onlinequant_backend.graph.layer_info import (
    CONV_TARGETS,
    TRANSPOSED_TARGETS,
    LayerInfo,
    Measured,
    is_cast,
    layer_nodes,
    weight_parameter,
)
from onlinequant_backend.quantization import stored_weights
from onlinequant_backend.report.report import CANDIDATE

from .context import PassContext
from .scale_outputs import IS_SCALING

_log = logging.getLogger("onlinequant")
_T = TypeVar("_T", bound=Measured)

# The most nodes from the input of a residual block to its end.
_BLOCK_LENGTH = 32
# The largest share of a model's operations with which its first or last layer stays in float.
_LITTLE_WORK = 0.05
# Tensor methods that only rearrange values.
_ARRANGEMENTS = ("flatten", "permute", "reshape", "squeeze", "transpose", "unflatten", "unsqueeze", "view")
_NOT_WORTH_IT = "cheap, but would cause most of the image's error"
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select_nodes(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Decide for every layer whether it is quantized, and record the reason.

    Before: ``LayerInfo(quantized=False, reason="not decided yet")``. After: ``quantized`` and ``reason`` are set, in
    this order: what cannot be quantized, density thresholds, on GPUs measured times, percentages (least sensitive
    first), ``exclude``.

    Runs twice: before observing, when percentages other than 0 have no effect, and again once the sensitivities are
    measured. The first run numbers all layers that could be quantized (``LayerInfo.index``), selected or not: all are
    observed, so that they are calibrated for other options and for other shapes, at which a layer is denser. Returns
    how many decisions changed.
    """
    before = {info.name: (info.quantized, info.reason) for _, info in layer_nodes(graph_module)}
    memory = Memory(graph_module)
    possible = 0
    work = sum(info.flops for _, info in layer_nodes(graph_module))
    for node, info in layer_nodes(graph_module):
        impossible = _impossible(node, info, memory)
        if impossible is None and not context.measured:
            info.index = possible
            possible += 1
        refusal = impossible or _refused_by_options(info, context) or _refused_for_quality(node, info, work, context)
        info.quantized, info.reason = (
            refusal is None,
            refusal or ("selected" if context.measured else CANDIDATE),
        )
    if context.measured:
        for kind in ("conv", "linear"):
            _apply_percentage(graph_module, kind, context)
    for _, info in layer_nodes(graph_module):
        pattern = exclusion.matching(info.name, context.config.exclude)
        if info.quantized and pattern is not None:
            info.quantized, info.reason = False, f"excluded by {pattern!r}"
        if info.index in context.freed:
            info.quantized, info.reason = True, "selected: its float weight is gone (free_float_weights)"
    after = {info.name: (info.quantized, info.reason) for _, info in layer_nodes(graph_module)}
    return sum(before[name] != after[name] for name in before)


def _refused_by_options(info: LayerInfo, context: PassContext) -> str | None:
    config = context.config
    if context.precision.name == "float":
        return f"float: {context.precision.reason}"
    threshold, name = context.threshold(info.kind)
    if info.density < threshold:
        return f"density {info.density:.4g} is below {name}"
    if getattr(config, f"quantized_{info.kind}_percentage") == 0:
        return f"quantized_{info.kind}_percentage is 0"
    return context.unusable.get(info.name)


def _refused_for_quality(node: fx.Node, info: LayerInfo, work: int, context: PassContext) -> str | None:
    """The refusal of cheap layers that cause most of the error: in float they cut an image's squared error to a tenth.

    ``work``: floating-point operations of all layers.
    """
    if _is_shortcut(node, info):
        return f"a shortcut around a residual block: {_NOT_WORTH_IT}"
    if info.flops < _LITTLE_WORK * work:
        if _is_result(node):
            return f"the model's last layer: {_NOT_WORTH_IT}"
        if info.kind == "conv" and _is_input(fx_utils.argument(node, 0, "input")):
            return f"the model's first layer: {_NOT_WORTH_IT}"
    return None


def _is_result(node: fx.Node) -> bool:
    """Whether a value is a result of the model, possibly rearranged or with values written into it."""
    return any(
        user.op == "output" or ((_is_arranging(user) or fx_utils.writes_in_place(user)) and _is_result(user))
        for user in node.users
    )


def _is_arranging(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target in _ARRANGEMENTS) or IS_SCALING in node.meta


def _is_input(node: fx.Node) -> bool:
    """Whether a value is an input of the model, possibly in another dtype or rearranged."""
    while _is_arranging(node) or is_cast(node) or (node.op == "call_method" and node.target == "contiguous"):
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _is_shortcut(node: fx.Node, info: LayerInfo) -> bool:
    """Whether a 1x1 convolution is added to a value that other layers computed from the same input."""
    if info.kind != "conv" or any(size != 1 for size in info.weight_shape[2:]) or len(node.users) != 1:
        return False
    add = next(iter(node.users))
    if add.target not in (operator.add, operator.iadd, torch.add):
        return False
    x = fx_utils.argument(node, 0, "input")
    return any(other is not node and _is_made_of(other, x) for other in add.all_input_nodes)


def _is_made_of(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` was computed from ``source``, at most one residual block back."""
    seen = {node}
    front = [node]
    for _ in range(_BLOCK_LENGTH):
        front = [value for reader in front for value in reader.all_input_nodes if value not in seen]
        if source in front:
            return True
        seen.update(front)
    return False


def beyond_percentage(selected: Sequence[_T], option: str, percentage: float) -> Iterator[tuple[_T, str]]:
    """Those that are too sensitive to be in the share that ``option`` keeps, with their rank in words. Equal
    sensitivities go by graph order."""
    ranked = sorted(selected, key=lambda info: info.error)
    keep = round(len(ranked) * percentage / 100)
    for rank, info in enumerate(ranked[keep:], start=keep + 1):
        yield info, f"ranks {rank} of {len(ranked)}; {option}={percentage:g} keeps {keep}"


def _apply_percentage(graph_module: fx.GraphModule, kind: str, context: PassContext) -> None:
    """Keep the least sensitive share of the layers of one kind; equal sensitivities go by graph order."""
    percentage = getattr(context.config, f"quantized_{kind}_percentage")
    selected = [info for _, info in layer_nodes(graph_module) if info.kind == kind and info.quantized]
    for info, rank in beyond_percentage(selected, f"quantized_{kind}_percentage", percentage):
        info.quantized, info.reason = False, f"sensitivity {info.error:.3g} {rank}"


def _impossible(node: fx.Node, info: LayerInfo, memory: Memory) -> str | None:
    """Why no 8-bit kernel can replace this node, or None; fills in a convolution's geometry."""
    if node.target in TRANSPOSED_TARGETS:
        return "transposed convolutions have no 8-bit kernel"
    parameter = weight_parameter(node)
    if parameter is None:
        return "its weight is computed in the graph, not a parameter"
    if memory.is_written(parameter):
        return "its weight is written in the graph"
    unreadable = stored_weights.unreadable(fx_utils.example(parameter))
    if unreadable is not None:
        return unreadable
    if not info.output_shape:
        return "its shapes are not known"
    if not info.flops:
        return "it computes nothing"
    if info.kind == "linear" and len(info.weight_shape) != 2:
        return "its weight is not a matrix"
    if fx_utils.example(node).dtype not in _FLOAT_DTYPES:
        return f"its dtype {fx_utils.example(node).dtype} has no 8-bit kernel"
    return _impossible_conv(node, info) if info.kind == "conv" else None


def _impossible_conv(node: fx.Node, info: LayerInfo) -> str | None:
    dimensions = len(info.weight_shape) - 2
    if node.target not in CONV_TARGETS or dimensions not in (2, 3):
        return f"{dimensions}-d convolutions have no 8-bit kernel"
    if len(info.input_shape) != dimensions + 2:
        return "its input has no batch dimension"
    groups = fx_utils.argument(node, 6, "groups", 1)
    if groups != 1:
        return f"grouped convolutions (groups={groups}) have no 8-bit kernel"
    geometry = _geometry(node, info, dimensions)
    if isinstance(geometry, str):
        return geometry
    info.geometry = geometry
    return None


def _geometry(node: fx.Node, info: LayerInfo, dimensions: int) -> ConvGeometry | str:
    def per_dimension(position: int, name: str, default: int) -> tuple[int, ...] | None:
        value = fx_utils.argument(node, position, name, default)
        if isinstance(value, fx.Node):
            return None
        values = (value,) * dimensions if isinstance(value, int) else tuple(value)
        values = values * dimensions if len(values) == 1 else values
        return values if all(isinstance(number, int) for number in values) else None

    stride, dilation = per_dimension(3, "stride", 1), per_dimension(5, "dilation", 1)
    if stride is None or dilation is None:
        return "its geometry is computed in the graph"
    padding = fx_utils.argument(node, 4, "padding", 0)
    if padding == "same":
        reach = [dil * (kernel - 1) for dil, kernel in zip(dilation, info.weight_shape[2:], strict=True)]
        if any(size % 2 for size in reach):
            return 'padding="same" is lopsided for an even kernel, which has no 8-bit kernel'
        return ConvGeometry(stride, tuple(size // 2 for size in reach), dilation)
    if padding == "valid":
        return ConvGeometry(stride, (0,) * dimensions, dilation)
    pads = per_dimension(4, "padding", 0)
    return "its geometry is computed in the graph" if pads is None else ConvGeometry(stride, pads, dilation)
