"""Attention in 8 bit against torch's in float, at the shapes of SDXL, SD1.5, SVD, FLUX.1 and Wan, on an NVIDIA GPU.

    python benchmarks/gpu_attention.py --json attention.jsonl

Operands are float16 (bfloat16 for FLUX.1 and Wan), laid out as linear layers give them. Times are medians over replays
of a CUDA graph. Ours include the quantization of all operands; tiles are the fastest of a few, as in a model. Beside
torch's choice, each of its backends is forced, where it can run. SageAttention is measured if it is installed. The
ratio is to the fastest in float. The error is relative to float64, of the first 256 queries of a batch entry, whose
keys and values have a structure: of random ones, attention averages everything away. ``--tiny`` checks on a CPU that
everything runs; its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.gpu_conv import milliseconds
from benchmarks.gpu_timing import require_cuda
from benchmarks.models import relative_error
from onlinequant_backend import ops
from onlinequant_backend.kernels import formats, reference
from onlinequant_backend.kernels.nvidia import operators, tuning
from onlinequant_backend.kernels.nvidia.gpu import gpu_of

Function = Callable[[], torch.Tensor]
Timer = Callable[[Function], float]
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DEFAULT = "torch's default"
FLOATS = (DEFAULT, *BACKENDS)
SHORT = "ours short"
LONGEST_SHORT = 64  # tokens: see ``short_attention``
CHECKED = 256  # queries whose error is measured


@dataclasses.dataclass(frozen=True)
class Shape:
    """Attention of ``batch`` entries: heads, queries, tokens and the size of a head."""

    model: str
    batch: int
    heads: int
    queries: int
    tokens: int
    size: int
    dtype: torch.dtype = torch.float16

    def __str__(self) -> str:
        return f"{self.model} {self.batch}x{self.heads}, {self.queries} x {self.tokens}, {self.size}"

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.tokens * self.size

    @property
    def is_short(self) -> bool:
        return max(self.queries, self.tokens) <= LONGEST_SHORT

    def tiny(self) -> Shape:
        """A smaller one of the same kind."""
        batch, queries, tokens = min(self.batch, 2), min(self.queries, 80), min(self.tokens, 80)
        return dataclasses.replace(self, batch=batch, heads=2, queries=queries, tokens=tokens)


SHAPES = (
    Shape("SDXL", 2, 10, 4096, 4096, 64),
    Shape("SDXL", 2, 20, 1024, 1024, 64),
    Shape("SDXL cross", 2, 10, 4096, 77, 64),
    Shape("SDXL cross", 2, 20, 1024, 77, 64),
    Shape("SD1.5", 2, 8, 4096, 4096, 40),
    Shape("SD1.5", 2, 8, 1024, 1024, 80),
    Shape("SD1.5", 2, 8, 256, 256, 160),
    Shape("SVD", 50, 5, 9216, 9216, 64),
    Shape("SVD", 50, 10, 2304, 2304, 64),
    Shape("SVD", 50, 20, 576, 576, 64),
    Shape("SVD over time", 18432, 5, 25, 25, 64),
    Shape("SVD over time", 4608, 10, 25, 25, 64),
    Shape("SVD over time", 1152, 20, 25, 25, 64),
    Shape("FLUX.1", 1, 24, 4608, 4608, 128, torch.bfloat16),
    Shape("Wan", 1, 12, 32768, 32768, 128, torch.bfloat16),
    Shape("Wan cross", 1, 12, 32768, 512, 128, torch.bfloat16),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One way to compute one shape: milliseconds and relative error, or why it cannot."""

    shape: str
    method: str
    flops: int
    ms: float | None = None
    error: float | None = None
    tile: str = ""
    failure: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def operands(shape: Shape, device: str) -> Operands:
    """[batch, heads, tokens, size]: queries, keys and values are about one of 16 things each, with noise."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device, generator=generator, dtype=torch.float32).to(shape.dtype)

    things, contents = random(16, shape.heads, shape.size), random(16, shape.heads, shape.size)
    topics = torch.randint(16, (shape.tokens,), device=device, generator=generator)
    asked = torch.randint(16, (shape.queries,), device=device, generator=generator)

    def about(means: torch.Tensor) -> torch.Tensor:
        noise = random(shape.batch, means.shape[0], shape.heads, shape.size)
        return noise.mul_(0.5).add_(means).transpose(1, 2)

    return about(1.5 * things[asked]), about(1.5 * things[topics]), about(contents[topics])


def in_float(given: Operands, backend: SDPBackend | None) -> Function:
    """Attention in float by one of torch's backends, or by the one that it chooses."""

    def run() -> torch.Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(*given)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*given)

    return run


def tune(shape: Shape, given: Operands, format: str, timer: Timer) -> str:
    """Have the op take the fastest tile from now on; names it."""
    dtype, gpu, scale = formats.attention_dtype(format), gpu_of(given[0].device), shape.size**-0.5
    sizes = (shape.batch * shape.heads, shape.queries, shape.tokens, shape.size, dtype)
    times = {}
    for tile in tuning.attention_tiles(*sizes, gpu):
        times[tile] = timer(lambda tile=tile: operators.run_attention(*given, scale, format, tile))  # type: ignore[misc]
    best = min(times, key=times.__getitem__)
    tuning.choose({("attention", *sizes): best}, gpu)
    return f"{best.rows}x{best.columns}, {best.warps} warps"


def ours(shape: Shape, given: Operands, format: str) -> Function:
    """The op in a format."""
    return lambda: ops.attention(*given, shape.size**-0.5, format)


def peers(given: Operands) -> Iterator[tuple[str, Function]]:
    """What is installed of other packages."""
    try:
        sage = importlib.import_module("sageattention")
    except ImportError:
        return
    yield "SageAttention", lambda: sage.sageattn(*given, tensor_layout="HND", is_causal=False)


def methods(shape: Shape, given: Operands, timer: Timer, on_gpu: bool) -> Iterator[tuple[str, str, Function]]:
    """Names, formats that need tuning, and functions."""
    yield DEFAULT, "", in_float(given, None)
    if on_gpu:
        for name, backend in BACKENDS.items():
            yield name, "", in_float(given, backend)
    if shape.is_short:
        yield SHORT, "", ours(shape, given, "int8")  # the format does not matter
    else:
        for format in ("fp8", "int8"):
            yield f"ours {format}", format if on_gpu else "", ours(shape, given, format)
    if on_gpu:
        for name, function in peers(given):
            yield name, "", function


@torch.no_grad()
def measure(shape: Shape, timer: Timer, device: str) -> Iterator[Result]:
    """One shape by each method."""
    given = q, k, v = operands(shape, device)
    scale = shape.size**-0.5
    expected = reference.attention(q[:1, :, :CHECKED], k[:1], v[:1], scale).float()
    for name, format, function in methods(shape, given, timer, device == "cuda"):
        try:
            tile = tune(shape, given, format, timer) if format else ""
            error = relative_error(function()[:1, :, :CHECKED].float(), expected)
            yield Result(str(shape), name, shape.flops, timer(function), error, tile)
        except Exception as failure:  # not every backend takes every shape
            reason = str(failure).strip().splitlines() or [type(failure).__name__]
            yield Result(str(shape), name, shape.flops, failure=reason[0][:80])


def best_float(results: Sequence[Result], shape: str) -> float:
    """Milliseconds of the fastest in float."""
    times = [row.ms for row in results if row.shape == shape and row.method in FLOATS and row.ms is not None]
    return min(times, default=math.nan)


def ratios(results: Sequence[Result]) -> dict[str, list[float]]:
    """By method, how many times as fast as the best in float it is at each shape."""
    found: dict[str, list[float]] = {}
    for row in results:
        best = best_float(results, row.shape)
        if row.ms is not None and not math.isnan(best):
            found.setdefault(row.method, []).append(best / row.ms)
    return found


def table(title: str, results: Sequence[Result]) -> Table:
    """A row for each method at each shape, and the geometric means of the ratios at last."""
    result = Table(title=title)
    for heading in ("", "method", "GFLOP", "us", "TFLOP/s", "to best float", "relative error", "tile"):
        result.add_column(heading, justify="left" if heading in ("", "method", "tile") else "right", no_wrap=True)
    for shape in dict.fromkeys(row.shape for row in results):
        for row in results:
            if row.shape != shape:
                continue
            numbers = ["", "", "", row.failure]
            if row.ms is not None and row.error is not None:
                rate, ratio = row.flops / row.ms / 1e9, best_float(results, shape) / row.ms
                numbers = [f"{1e3 * row.ms:.1f}", f"{rate:.0f}", f"{ratio:.2f}x", f"{row.error:.4f}"]
            result.add_row(shape, row.method, f"{row.flops / 1e9:.1f}", *numbers, row.tile)
        result.add_section()
    for method, values in ratios(results).items():
        mean = f"{statistics.geometric_mean(values):.2f}x"
        result.add_row("geometric mean", method, "", "", "", mean, f"{len(values)} shapes")
    return result


def wall_milliseconds(function: Function) -> float:
    """The time of one call on a CPU."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help='shapes whose description holds this text, for instance "SVD"')
    parser.add_argument("--json", type=Path, help="append each result to this file, as one line, when it is finished")
    parser.add_argument("--tiny", action="store_true", help="small shapes, emulated on a CPU")
    options = parser.parse_args(arguments)
    if not options.tiny:
        require_cuda()
    device, timer = ("cpu", wall_milliseconds) if options.tiny else ("cuda", milliseconds)
    chosen = [shape for shape in SHAPES if options.only in str(shape)]
    if options.tiny:
        chosen = list(dict.fromkeys(shape.tiny() for shape in chosen))
    results: list[Result] = []
    for shape in chosen:
        print(f"measuring {shape}", file=sys.stderr, flush=True)
        for result in measure(shape, timer, device):
            if options.json:
                with options.json.open("a") as file:
                    file.write(result.to_json() + "\n")
            results.append(result)
    where = "emulated on a CPU: times mean nothing" if options.tiny else torch.cuda.get_device_name()
    Console(width=160).print(table(f"Attention, {where}", results))


if __name__ == "__main__":
    main()
