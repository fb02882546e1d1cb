"""One layer at its real shape on a GPU, run in float and quantized, and timed."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F

from ..compilation import cuda_graphs
from ..graph import AttentionInfo, LayerInfo
from ..kernels import formats
from ..kernels.formats import Format
from ..kernels.nvidia import operators, precompile, tuning
from ..kernels.nvidia.gpu import Gpu, gpu_of
from ..kernels.nvidia.tuning import Tile
from ..kernels.operands import Operands
from ..quantization.weight_quantization import quantize_weight
from ..tensors import CHANNELS_LAST, relative_error

_log = logging.getLogger("onlinequant")
Result = TypeVar("Result")
# The runs timed together, and the repetitions, of which the fastest counts.
_RUNS, _TIMES = 8, 3
# How long the GPU is kept busy while they are launched: about two milliseconds, and at most a tenth of a second.
_BUSY_CYCLES, _MOST_CYCLES = 3_000_000, 192_000_000
# The most values of queries, keys or values with which attention is timed; its time is proportional to the batch.
_MOST_VALUES = 2**25
# The relative error from which a kernel for attention must be wrong. That of fp8 is 0.06 for normal noise.
_MOST_ERROR = 0.25
# The number of candidates timed for each shape: each costs a compile by Triton.
_CANDIDATES = 4


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one shape in microseconds: in float, quantized with the best tile, and of quantizing its input alone."""

    float_us: float
    quantized_us: float
    quantize_us: float
    tile: Tile


def shape_of(info: LayerInfo | AttentionInfo, format: Format) -> tuning.Shape:
    """The shape for which a tile is chosen."""
    if isinstance(info, AttentionInfo):
        batch, heads, queries, size = info.input_shape
        return "attention", batch * heads, queries, info.weight_shape[2], size, format.activation
    if info.geometry is None:
        return (math.prod(info.input_shape[:-1]), *info.weight_shape, format.activation)
    return info.input_shape, info.weight_shape, info.geometry, format.activation


def candidates(info: LayerInfo | AttentionInfo, format: Format, gpu: Gpu) -> tuple[Tile, ...]:
    """The tiles to time, the best guess first."""
    if isinstance(info, AttentionInfo):
        found = tuning.attention_tiles(*shape_of(info, format)[1:], gpu)
        return found[: 1 if info.is_short else _CANDIDATES]  # the kernel for short sequences has none
    tiles = tuning.linear_tiles if info.geometry is None else tuning.conv_tiles
    return tiles(*shape_of(info, format), gpu)[:_CANDIDATES]


class Trial:
    """One layer at its real shape, to be run in float and quantized."""

    def __init__(self, info: LayerInfo, format: Format, device: torch.device) -> None:
        self._info = info
        self._x = torch.randn(info.input_shape, device=device, dtype=info.dtype)
        self._weight = torch.randn(info.weight_shape, device=device, dtype=info.dtype)
        if device == precompile.NOWHERE:
            self._q = torch.empty_like(self._weight, dtype=format.weight)
            self._scale = torch.empty(format.scale_shape(info.weight_shape), dtype=torch.float32, device=device)
        else:
            self._q, self._scale = quantize_weight(self._weight, format)
        # Triton compiles separate kernels with and without a bias, and most layers have one.
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
        return convolve(self._x, self._weight, self._bias, *self._info.geometry)

    def quantize(self) -> torch.Tensor:
        return self._x.to(self._format)

    def check(self, result: torch.Tensor) -> None:
        """Nothing: all that differs is how a product is divided."""

    def run(self, tile: Tile) -> torch.Tensor:
        operands = Operands(self._xq, self._qparams, self._q, self._scale, self._bias)
        if self._info.geometry is None:
            return operators.run_linear(operands, self._info.dtype, tile)
        return operators.run_conv(operands, self._info.geometry, self._info.dtype, tile)


class AttentionTrial:
    """Attention with its real sequences, as many as are needed, to be run by torch and by this package's kernels.

    Attributes:
        share: the part of the real batch that it has.
    """

    def __init__(self, info: AttentionInfo, format: Format, device: torch.device) -> None:
        batch, heads, queries, size = info.input_shape
        tokens = info.weight_shape[2]
        some = max(min(batch, _MOST_VALUES // (heads * max(queries, tokens) * size)), 1)
        self.share = some / batch

        def made(length: int) -> torch.Tensor:
            """Laid out as linear layers give it."""
            return torch.randn((some, length, heads, size), device=device, dtype=info.dtype).transpose(1, 2)

        self._operands = made(queries), made(tokens), made(tokens)
        self._scale = size**-0.5
        self._format = formats.FLOAT if info.is_short else format.name

    def in_float(self) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self._operands)

    def run(self, tile: Tile) -> torch.Tensor:
        return operators.run_attention(*self._operands, self._scale, self._format, tile)

    def check(self, result: torch.Tensor) -> None:
        """Raise RuntimeError if a result is not near to torch's: not every GPU was tried with every kernel."""
        error = relative_error(result, self.in_float())
        if not error < _MOST_ERROR:
            _log.warning("a kernel for attention in %s is not used: its relative error is %.2g", self._format, error)
            raise RuntimeError(f"its relative error is {error:.2g}")


def trial_of(info: LayerInfo | AttentionInfo, format: Format, device: torch.device) -> Trial | AttentionTrial:
    """What runs a layer or attention."""
    return AttentionTrial(info, format, device) if isinstance(info, AttentionInfo) else Trial(info, format, device)


def time_layer(info: LayerInfo | AttentionInfo, format: Format, device: torch.device) -> Timing:
    """Time a layer or attention in float, and quantized with each candidate."""
    trial, clock = trial_of(info, format, device), Clock(device)
    tiles = candidates(info, format, gpu_of(device))
    times = {tile: clock.time_if_possible(functools.partial(trial.run, tile), trial.check) for tile in tiles}
    best = min(times, key=lambda tile: times[tile])
    if isinstance(trial, AttentionTrial):
        return Timing(clock.time(trial.in_float) / trial.share, times[best] / trial.share, 0.0, best)
    return Timing(clock.time(trial.in_float), times[best], clock.time(trial.quantize), best)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of the allocator, CUDA, or cuBLAS means out of memory."""
    return "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


class Clock:
    """Times runs of one layer, while no other kernels of this package run on the device. Does not use a CUDA graph: a
    device synchronization in another thread would invalidate its capture. Instead the GPU is kept busy until all runs
    are launched, and then executes them back to back.
    """

    def __init__(self, device: torch.device) -> None:
        self._lane = cuda_graphs.lane_of(device)

    def time(self, run: Callable[[], object]) -> float:
        """Microseconds of one run in a series, without launch overhead."""
        with self._lane.turn():
            run()  # compiles and loads it, and raises if it cannot run
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
                if was_late:  # the GPU was idle before the last one was launched
                    cycles *= 4
                else:
                    times.append(start.elapsed_time(end))
        return 1000 * min(times) / _RUNS

    def time_if_possible(self, run: Callable[[], Result], check: Callable[[Result], None]) -> float:
        """As ``time``; 1e9 if the run fails, since a tile may need more shared memory than a smaller GPU has, or if
        ``check`` refuses its result."""
        try:
            with self._lane.turn():
                check(run())
            return self.time(run)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            _log.debug("a tile cannot be timed: %s", error)
            return 1e9
