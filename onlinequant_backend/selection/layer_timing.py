"""Measured selection: which layers are faster quantized at their real shapes on this GPU, and with which tiles."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from ..best_effort import best_effort
from ..compilation.compile_process import IDLE, done_elsewhere
from ..graph import AttentionInfo, LayerInfo, fx_utils, layer_reads
from ..graph.attention_info import attention_nodes
from ..kernels.formats import Format
from ..kernels.nvidia import precompile, tuning
from ..kernels.nvidia.gpu import Gpu, gpu_of
from ..kernels.nvidia.tuning import Tile
from ..progress import Progress
from .layer_trial import Timing, candidates, is_out_of_memory, shape_of, time_layer, trial_of

_log = logging.getLogger("onlinequant")
_VERSION = 1
# A layer must be faster by this share: times vary a little, and quantization costs accuracy. After a norm any gain is
# enough: this package's norm kernels, which write 8-bit values, are faster than Inductor's float ones.
_LEAST_GAIN = 0.08
# Where memory matters most, a layer may even be slower by this share, since its weight takes half as much.
_MOST_LOSS = 0.25
# The largest float weight of a merged product that is timed, in bytes. The modulations of all blocks of FLUX.1 are one
# product of 6 GiB: to time it would take more memory than the 8-bit model.
_LARGEST_MERGED = 2**28

# Ops that do not change values, and ops that are elementwise or, like a norm, end with an elementwise part: Inductor,
# or a kernel of this package, fuses the quantization into these.
_VIEWS = ("contiguous", "flatten", "movedim", "permute", "reshape", "squeeze", "to", "transpose", "unsqueeze", "view")
_VIEW_FUNCTIONS = (torch.flatten, torch.movedim, torch.permute, torch.reshape, torch.transpose, F.dropout)
_POINTWISE = (
    *(F.layer_norm, F.group_norm, F.silu, F.gelu, F.interpolate, torch.cat, torch.add, torch.mul),
    *(operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv, "mul"),
)

Timed = LayerInfo | AttentionInfo
_known: dict[tuple[Gpu, str], Timing] = {}
_compiled: set[tuple[Gpu, str]] = set()  # shapes whose kernels are compiled
_CURRENT = torch.device("cuda")


def measure(
    graph_module: fx.GraphModule, format: Format, device: torch.device, saves_memory: bool = False
) -> dict[str, str]:
    """Time every layer and attention that could be quantized, once for each shape, and choose its tile. Linears that
    read one tensor are timed as the product into which ``merge_linears`` merges them. Fills in ``float_us`` and
    ``quantized_us`` of each; returns, by name, why any gains too little. If the GPU lacks the memory to time a layer,
    both stay unset, and the layer is treated as faster. ``saves_memory``: whether layers may also be a little slower.
    """
    groups = _groups(graph_module)
    gpu = gpu_of(device)
    shapes = _shapes(graph_module, groups, format)
    missing = {key: info for key, info in shapes.items() if (gpu, key) not in _known}
    if missing:
        compile_ahead(graph_module, format, device)
        with Progress("timing layers", len(missing)) as progress, torch.inference_mode(False), torch.no_grad():
            for key, info in missing.items():
                progress.advance(info.name)
                timing = _time_if_it_fits(info, format, device)
                if timing is not None:
                    _known[gpu, key] = timing
                torch.cuda.empty_cache()  # tensors of the next size would not fit into the memory of these
    known = {key: _known[gpu, key] for key in shapes if (gpu, key) in _known}
    tuning.choose({shape_of(shapes[key], format): timing.tile for key, timing in known.items()}, gpu)
    reasons = {}
    for members, source in groups:
        keys = [_key(info, format) for info in (*members, *_timed_merged(members))]
        if not all(key in known for key in keys):
            continue
        timings = [known[key] for key in keys[: len(members)]]
        products = [known[key] for key in keys[len(members) :]] or timings
        quantize_us = 0 if source.target in _POINTWISE else products[0].quantize_us
        quantized_us = quantize_us + sum(product.quantized_us for product in products)
        float_us = sum(timing.float_us for timing in timings)
        least_gain = -_MOST_LOSS if saves_memory else 0 if _is_norm(source) else _LEAST_GAIN
        is_worth_it = quantized_us <= float_us * (1 - least_gain)
        for info, timing in zip(members, timings, strict=True):
            info.float_us, info.quantized_us = timing.float_us, quantized_us * timing.float_us / float_us
            if not is_worth_it:
                reasons[info.name] = _gains_too_little(info)
    for attention in _attention(graph_module):
        found = known.get(_key(attention, format))
        if found is None:
            continue
        attention.float_us, attention.quantized_us = found.float_us, found.quantized_us
        if found.quantized_us > found.float_us * (1 - _LEAST_GAIN):
            reasons[attention.name] = _gains_too_little(attention)
    return reasons


def _gains_too_little(info: Timed) -> str:
    kind = "by this package" if isinstance(info, AttentionInfo) and info.is_short else "quantized"
    return f"gains too little: {info.quantized_us:.1f} us {kind}, {info.float_us:.1f} us in float"


def tune(info: LayerInfo, format: Format, device: torch.device) -> Timing:
    """Time one layer, and use the best tile for its shape from now on."""
    timing = time_layer(info, format, device)
    tuning.choose({shape_of(info, format): timing.tile}, gpu_of(device))
    return timing


def together(graph_module: fx.GraphModule) -> list[tuple[int, ...]]:
    """For each product that linears will most likely be merged into, the indices of its layers."""
    indices = [tuple(info.index for info in members if info.index is not None) for members, _ in _groups(graph_module)]
    return [group for group in indices if len(group) > 1]


def _groups(graph_module: fx.GraphModule) -> list[tuple[list[LayerInfo], fx.Node]]:
    """The layers that could be quantized, in groups that will be one product each, with the node that computes their
    input, looking through reordering."""
    groups: dict[object, tuple[list[LayerInfo], fx.Node]] = {}
    for node, info, read in layer_reads(graph_module):
        if info.index is not None:
            mergeable = info.geometry is None
            key = (read, fx_utils.argument(node, 2, "bias") is None, info.dtype) if mergeable else info.name
            groups.setdefault(key, ([], _source(read[0])))[0].append(info)
    return list(groups.values())


def _shapes(
    graph_module: fx.GraphModule, groups: Sequence[tuple[list[LayerInfo], fx.Node]], format: Format
) -> dict[str, Timed]:
    """The first layer, merged product or attention of each shape, by its key: these are timed."""
    timed: list[Timed] = [info for members, _ in groups for info in (*members, *_timed_merged(members))]
    shapes: dict[str, Timed] = {}
    for info in (*timed, *_attention(graph_module)):
        shapes.setdefault(_key(info, format), info)
    return shapes


def _attention(graph_module: fx.GraphModule) -> list[AttentionInfo]:
    return [info for _, info in attention_nodes(graph_module) if info.is_candidate]


def _source(node: fx.Node) -> fx.Node:
    while node.target in _VIEWS or node.target in _VIEW_FUNCTIONS:
        node = node.all_input_nodes[0]
    return node


def _is_norm(node: fx.Node) -> bool:
    if node.target is F.silu:
        node = _source(node.all_input_nodes[0])
    return node.target in (F.layer_norm, F.group_norm)


def _merged(members: Sequence[LayerInfo]) -> LayerInfo:
    """Linears that read one tensor, described as one merged layer."""
    first = members[0]
    if len(members) == 1:
        return first
    outputs = sum(info.weight_shape[0] for info in members)
    name = f"{first.name} and {len(members) - 1} more"
    return dataclasses.replace(first, name=name, weight_shape=(outputs, first.weight_shape[1]))


def _timed_merged(members: Sequence[LayerInfo]) -> list[LayerInfo]:
    """The merged layer; none if it is too large to be timed, so that its layers' own times have to do."""
    merged = _merged(members)
    is_too_large = math.prod(merged.weight_shape) * merged.dtype.itemsize > _LARGEST_MERGED
    return [] if is_too_large and len(members) > 1 else [merged]


def dump(graph_module: fx.GraphModule, format: Format, device: torch.device = _CURRENT) -> str | None:
    """The timings of a graph's layers as JSON, for ``restore``; None if there are none."""
    gpu = gpu_of(device)
    shapes = _shapes(graph_module, _groups(graph_module), format)
    keys = sorted(key for key in shapes if (gpu, key) in _known)
    if not keys:
        return None
    timings = {key: dataclasses.asdict(_known[gpu, key]) for key in keys}
    return json.dumps({"version": _VERSION, "device": gpu.name, "timings": timings}, indent=1)


def restore(text: str | None, device: torch.device = _CURRENT) -> int:
    """Load another process's timings for the same GPU; returns the number of shapes. Other timings are ignored."""
    gpu = gpu_of(device)
    try:
        data = json.loads(text or "{}")
        if data.get("version") != _VERSION or data.get("device") != gpu.name:
            return 0
        found = {(gpu, key): _timing(value) for key, value in data["timings"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        _log.info("measured timings in the cache cannot be read: %s", error)
        return 0
    _known.update(found)
    return len(found)


def _timing(value: Any) -> Timing:
    timing = Timing(value["float_us"], value["quantized_us"], value["quantize_us"], Tile(**value["tile"]))
    times = (timing.float_us, timing.quantized_us)
    is_sound = isinstance(timing.quantize_us, float) and 0 <= timing.quantize_us < math.inf
    if not is_sound or not all(isinstance(time, float) and 0 < time < math.inf for time in times):
        raise ValueError(f"times are {times}")
    if not tuning.is_valid(timing.tile):
        raise ValueError(f"there is no tile {timing.tile}")
    return timing


def _key(info: Timed, format: Format) -> str:
    return f"{tuning.key(shape_of(info, format))} {info.dtype}"


def compile_ahead(graph_module: fx.GraphModule, format: Format, device: torch.device) -> None:
    """Compile the kernels that ``measure`` will time, several in parallel, unless they are compiled already."""
    shapes = _shapes(graph_module, _groups(graph_module), format)
    gpu = gpu_of(device)
    missing = [info for key, info in shapes.items() if (gpu, key) not in _known and (gpu, key) not in _compiled]
    _compiled.update((gpu, key) for key in shapes)
    tiles = [(info, tile) for info in missing for tile in candidates(info, format, gpu)]
    if tiles:
        with Progress("compiling kernels", len(tiles)) as progress:
            is_done = False
            with best_effort("the other process cannot compile kernels"):
                is_done = done_elsewhere(compile_tiles, tiles, format, device, idle=IDLE)
            if not is_done:
                compile_tiles(tiles, format, device, progress.advance)


def compile_tiles(
    tiles: Sequence[tuple[Timed, Tile]],
    format: Format,
    device: torch.device,
    advance: Callable[[str], object] = lambda name: None,
) -> None:
    """Compile a kernel for each layer and tile; ``advance`` is called with the layer's name after each."""

    def call(info: Timed, tile: Tile) -> None:
        with precompile.on(device):
            trial_of(info, format, precompile.NOWHERE).run(tile)

    with precompile.threads() as pool:
        for (info, tile), done in [(each, pool.submit(call, *each)) for each in tiles]:
            if done.exception() is not None:
                _log.debug("%s, %s: %s", info.name, tile, done.exception())
            advance(info.name)


def _time_if_it_fits(info: Timed, format: Format, device: torch.device) -> Timing | None:
    """``time_layer``; None if memory runs out."""
    for is_last in (False, True):
        try:
            return time_layer(info, format, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if is_last:
                _log.warning("%s is not timed, but assumed to be faster quantized: %s", info.name, error)
        torch.cuda.empty_cache()  # memory cached for other streams may be enough
    return None
