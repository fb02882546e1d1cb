"""Measured selection: which layers are faster in 8 bit at their real shapes on this GPU, and with which tiles."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from ..best_effort import going_on
from ..compilation import cuda_graphs
from ..compilation.compile_process import IDLE, done_elsewhere
from ..graph import LayerInfo, fx_utils, layer_reads
from ..kernels.formats import Format
from ..kernels.nvidia import operators, precompile, tuning
from ..kernels.nvidia.tuning import Tile
from ..progress import Progress
from ..quantization.weight_quantization import quantize_weight, scales_in
from ..tensors import CHANNELS_LAST

_log = logging.getLogger("onlinequant")
_VERSION = 1
# Runs that are timed together, and how often, of which the quickest counts.
_RUNS, _TIMES = 8, 3
# For how long the GPU is kept busy while they are launched: two milliseconds or so, and at most a tenth of a second.
_BUSY_CYCLES, _MOST_CYCLES = 3_000_000, 192_000_000
# A layer must be faster by this share: times vary a little, and 8 bit costs accuracy. Any gain will do after a norm:
# our kernels for those, which write 8 bit, are faster than Inductor's for float.
_LEAST_GAIN = 0.08
# Candidates that are timed for each shape: each costs a compile by Triton.
_CANDIDATES = 4

# What leaves the values as they are, and what is computed value by value or, like a norm, ends so: then Inductor, or a
# kernel of ours, quantizes at once.
_VIEWS = ("contiguous", "flatten", "movedim", "permute", "reshape", "squeeze", "to", "transpose", "unsqueeze", "view")
_VIEW_FUNCTIONS = (torch.flatten, torch.movedim, torch.permute, torch.reshape, torch.transpose, F.dropout)
_POINTWISE = (
    *(F.layer_norm, F.group_norm, F.silu, F.gelu, F.interpolate, torch._C._nn.gelu, torch.cat, torch.add, torch.mul),
    *(operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv, "mul"),
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """One shape's times in microseconds: in float, in 8 bit with the best tile, and of quantizing its input alone."""

    float_us: float
    quantized_us: float
    quantize_us: float
    tile: Tile


_known: dict[str, Timing] = {}
_compiled: set[str] = set()  # shapes whose kernels are


def measure(graph_module: fx.GraphModule, format: Format, device: torch.device) -> dict[str, str]:
    """Time every layer that could be quantized, once for each shape, and choose its tile.

    Linears that read one tensor are timed as the one product that ``merge_linears`` makes of them. Fills in
    ``float_us`` and ``quantized_us`` of each ``LayerInfo``; returns, by name, why layers are not worth it. For a layer
    that the GPU has no memory to time, both stay as they are, and it is as good as any other.
    """
    groups = _groups(graph_module)
    shapes = _shapes(groups, format)
    missing = {key: info for key, info in shapes.items() if key not in _known}
    if missing:
        compile_ahead(graph_module, format, device)
        with Progress("timing layers", len(missing)) as progress, torch.inference_mode(False), torch.no_grad():
            for key, info in missing.items():
                progress.advance(info.name)
                timing = _time_if_it_fits(info, format, device)
                if timing is not None:
                    _known[key] = timing
            torch.cuda.empty_cache()
    tuning.choose({_tile_key(info, format): _known[key].tile for key, info in shapes.items() if key in _known})
    reasons = {}
    for members, source in groups:
        keys = [_key(info, format) for info in (_merged(members), *members)]
        if not all(key in _known for key in keys):
            continue
        merged, *timings = (_known[key] for key in keys)
        quantized_us = merged.quantized_us + (0 if source.target in _POINTWISE else merged.quantize_us)
        float_us = sum(timing.float_us for timing in timings)
        least_gain = 0 if _is_norm(source) else _LEAST_GAIN
        is_worth_it = quantized_us <= float_us * (1 - least_gain)
        for info, timing in zip(members, timings, strict=True):
            info.float_us, info.quantized_us = timing.float_us, quantized_us * timing.float_us / float_us
            if not is_worth_it:
                times = f"{info.quantized_us:.1f} us in 8 bit, {info.float_us:.1f} us in float"
                reasons[info.name] = f"gains too little: {times}"
    return reasons


def tune(info: LayerInfo, format: Format, device: torch.device) -> Timing:
    """Time one layer, and run its shape on the best tile from now on."""
    timing = _time_layer(info, format, device)
    tuning.choose({_tile_key(info, format): timing.tile})
    return timing


def together(graph_module: fx.GraphModule) -> list[tuple[int, ...]]:
    """The indices of layers that most likely will be one product, for each such product."""
    indices = [tuple(info.index for info in members if info.index is not None) for members, _ in _groups(graph_module)]
    return [group for group in indices if len(group) > 1]


def _groups(graph_module: fx.GraphModule) -> list[tuple[list[LayerInfo], fx.Node]]:
    """The layers that could be quantized, together those that will be one product; and what makes the values that
    they read, be they ordered anew or not."""
    groups: dict[object, tuple[list[LayerInfo], fx.Node]] = {}
    for node, info, read in layer_reads(graph_module):
        if info.index is not None:
            mergeable = info.geometry is None
            key = (read, fx_utils.argument(node, 2, "bias") is None, info.dtype) if mergeable else info.name
            groups.setdefault(key, ([], _source(read[0])))[0].append(info)
    return list(groups.values())


def _shapes(groups: Sequence[tuple[list[LayerInfo], fx.Node]], format: Format) -> dict[str, LayerInfo]:
    """What is timed: the first layer of each shape, or product of several, by its key."""
    shapes: dict[str, LayerInfo] = {}
    for members, _ in groups:
        for info in [*members, _merged(members)]:
            shapes.setdefault(_key(info, format), info)
    return shapes


def _source(node: fx.Node) -> fx.Node:
    while node.target in _VIEWS or node.target in _VIEW_FUNCTIONS:
        node = node.all_input_nodes[0]
    return node


def _is_norm(node: fx.Node) -> bool:
    if node.target is F.silu:
        node = _source(node.all_input_nodes[0])
    return node.target in (F.layer_norm, F.group_norm)


def _merged(members: Sequence[LayerInfo]) -> LayerInfo:
    """Linears that read one tensor as one."""
    first = members[0]
    if len(members) == 1:
        return first
    outputs = sum(info.weight_shape[0] for info in members)
    name = f"{first.name} and {len(members) - 1} more"
    return dataclasses.replace(first, name=name, weight_shape=(outputs, first.weight_shape[1]))


def dump(graph_module: fx.GraphModule, format: Format) -> str | None:
    """What ``restore`` takes: the timings of a graph's layers as JSON; None if there are none."""
    keys = sorted(_shapes(_groups(graph_module), format).keys() & _known.keys())
    if not keys:
        return None
    timings = {key: dataclasses.asdict(_known[key]) for key in keys}
    return json.dumps({"version": _VERSION, "device": torch.cuda.get_device_name(), "timings": timings}, indent=1)


def restore(text: str | None) -> int:
    """Take over what another process has measured on such a GPU; returns how many shapes. Anything else is ignored."""
    try:
        data = json.loads(text or "{}")
        if data.get("version") != _VERSION or data.get("device") != torch.cuda.get_device_name():
            return 0
        found = {key: _timing(value) for key, value in data["timings"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        _log.info("measured timings in the cache cannot be read: %s", error)
        return 0
    _known.update(found)
    return len(found)


def _timing(value: Any) -> Timing:
    timing = Timing(value["float_us"], value["quantized_us"], value["quantize_us"], Tile(**value["tile"]))
    times = (timing.float_us, timing.quantized_us, timing.quantize_us)
    if not all(isinstance(time, float) and 0 < time < math.inf for time in times):
        raise ValueError(f"times are {times}")
    if not tuning.is_valid(timing.tile):
        raise ValueError(f"there is no tile {timing.tile}")
    return timing


def _key(info: LayerInfo, format: Format) -> str:
    return f"{_tile_key(info, format)} {info.dtype}"


def _tile_key(info: LayerInfo, format: Format) -> str:
    if info.geometry is None:
        outputs, inputs = info.weight_shape
        return tuning.linear_key(math.prod(info.input_shape[:-1]), outputs, inputs, format.activation)
    return tuning.conv_key(info.input_shape, info.weight_shape, _geometry(info), format.activation)


def _geometry(info: LayerInfo) -> tuning.Geometry:
    assert info.geometry is not None
    return info.geometry.stride, info.geometry.padding, info.geometry.dilation


class _Trial:
    """One layer at its real shape, to be run in float and in 8 bit."""

    def __init__(self, info: LayerInfo, format: Format, device: torch.device) -> None:
        self._info = info
        self._x = torch.randn(info.input_shape, device=device, dtype=info.dtype)
        self._weight = torch.randn(info.weight_shape, device=device, dtype=info.dtype)
        if device == precompile.NOWHERE:
            self._q = torch.empty_like(self._weight, dtype=format.weight)
            self._scale = torch.empty(scales_in(info.weight_shape, format), dtype=torch.float32, device=device)
        else:
            self._q, self._scale = quantize_weight(self._weight, format)
        # Triton compiles kernels with and without a bias apart, and most layers have one.
        self._bias = torch.zeros(info.weight_shape[0], device=device, dtype=info.dtype)
        qparams = torch.tensor([16.0, 0.0, 1 / 16], dtype=torch.float32, device="cpu")
        self._qparams = torch.empty(5, dtype=torch.float32, device=device)[2:].copy_(qparams)
        self._format = format.activation
        if info.geometry is None:
            self._x = self._x.flatten(0, -2)
        else:
            layout = CHANNELS_LAST[self._x.dim()]
            self._x, self._weight, self._q = (
                tensor.contiguous(memory_format=layout) for tensor in (self._x, self._weight, self._q)
            )
        self._xq = self.quantize()

    def in_float(self) -> torch.Tensor:
        if self._info.geometry is None:
            return F.linear(self._x, self._weight, self._bias)
        convolve = F.conv2d if self._x.dim() == 4 else F.conv3d
        return convolve(self._x, self._weight, self._bias, *_geometry(self._info))

    def quantize(self) -> torch.Tensor:
        return self._x.to(self._format)

    def run(self, tile: Tile) -> torch.Tensor:
        operands = (self._xq, self._qparams, self._q, self._scale, self._bias)
        if self._info.geometry is None:
            return operators.run_linear(*operands, self._info.dtype, tile)
        return operators.run_conv(*operands, _geometry(self._info), self._info.dtype, None, None, tile)


def _candidates(info: LayerInfo, format: Format) -> tuple[Tile, ...]:
    if info.geometry is None:
        rows = math.prod(info.input_shape[:-1])
        tiles = tuning.linear_tiles(rows, *info.weight_shape, format.activation)
    else:
        tiles = tuning.conv_tiles(info.input_shape, info.weight_shape, _geometry(info), format.activation)
    return tiles[:_CANDIDATES]


def compile_ahead(graph_module: fx.GraphModule, format: Format, device: torch.device) -> None:
    """Compile the kernels that ``measure`` will time, several at a time, where that is still to be done."""
    shapes = _shapes(_groups(graph_module), format)
    missing = [info for key, info in shapes.items() if key not in _known and key not in _compiled]
    _compiled.update(shapes)
    tiles = [(info, tile) for info in missing for tile in _candidates(info, format)]
    if tiles:
        with Progress("compiling kernels", len(tiles)) as progress:
            is_done = False
            with going_on("the other process cannot compile kernels"):
                is_done = done_elsewhere(compile_tiles, tiles, format, device, idle=IDLE)
            if not is_done:
                compile_tiles(tiles, format, device, progress.advance)


def compile_tiles(
    tiles: Sequence[tuple[LayerInfo, Tile]],
    format: Format,
    device: torch.device,
    advance: Callable[[str], object] = lambda name: None,
) -> None:
    """Compile a kernel for each layer and tile; ``advance`` is called with the layer's name after each."""

    def call(info: LayerInfo, tile: Tile) -> None:
        with precompile.on(device):
            _Trial(info, format, precompile.NOWHERE).run(tile)

    with precompile.threads() as pool:
        for (info, tile), done in [(each, pool.submit(call, *each)) for each in tiles]:
            if done.exception() is not None:
                _log.debug("%s, %s: %s", info.name, tile, done.exception())
            advance(info.name)


def _time_if_it_fits(info: LayerInfo, format: Format, device: torch.device) -> Timing | None:
    """``_time_layer``; None where memory runs out."""
    for is_last in (False, True):
        try:
            return _time_layer(info, format, device)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if is_last:
                _log.warning("%s is not timed, but taken for faster in 8 bit: %s", info.name, error)
        torch.cuda.empty_cache()  # what other streams have left may be enough
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Of the allocator, of CUDA, or of cuBLAS."""
    return "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


def _time_layer(info: LayerInfo, format: Format, device: torch.device) -> Timing:
    trial, clock = _Trial(info, format, device), _Clock(device)
    times = {tile: clock.time_if_possible(functools.partial(trial.run, tile)) for tile in _candidates(info, format)}
    best = min(times, key=lambda tile: times[tile])
    return Timing(clock.time(trial.in_float), times[best], clock.time(trial.quantize), best)


class _Clock:
    """Times runs of one layer, while nothing else of ours runs on the device.

    Not in a CUDA graph: another thread that waits for the device meanwhile would make its capture invalid. So the GPU
    is kept busy until all runs are launched, and then does them one after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self._lane = cuda_graphs.lane_of(device)

    def time(self, run: Callable[[], object]) -> float:
        """Microseconds of one run among others of its kind, without the time it takes to launch."""
        with self._lane.turn():
            run()  # compiles, loads and shows whether it can be run at all
            torch.cuda.synchronize(self._lane.device)
            cycles, times = _BUSY_CYCLES, list[float]()
            while len(times) < _TIMES:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(cycles)
                start.record()
                for _ in range(_RUNS):
                    run()
                end.record()
                was_late = start.query() and cycles < _MOST_CYCLES
                end.synchronize()
                if was_late:  # the GPU was done before the last one was launched
                    cycles *= 4
                else:
                    times.append(start.elapsed_time(end))
        return 1000 * min(times) / _RUNS

    def time_if_possible(self, run: Callable[[], object]) -> float:
        """The same; a time that no other is longer than if it fails, as a tile may need more shared memory than a
        smaller GPU has."""
        try:
            return self.time(run)
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            _log.debug("a tile cannot be timed: %s", error)
            return 1e9
