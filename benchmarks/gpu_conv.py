"""8-bit convolutions against cuDNN's in float16, at the shapes of SDXL, SD1.5 and SVD, on an NVIDIA GPU.

    python benchmarks/gpu_conv.py --format fp8 int8

Times are medians over replays of a CUDA graph, so that the host does not matter. On both sides all calls read the same
tensors, which may stay in the L2 cache. The input is quantized already: in a model that is part of the kernel before.
Tiles are chosen as a model's are: the fastest of a few. cuDNN chooses its fastest algorithm
(``torch.backends.cudnn.benchmark``), in three dimensions also the faster of the two memory formats. "TFLOP/s" counts
the same operations on both sides; the error is relative to the convolution in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.gpu_timing import require_cuda
from benchmarks.models import relative_error
from onlinequant_backend import ops
from onlinequant_backend.graph import ConvGeometry, LayerInfo
from onlinequant_backend.kernels import formats
from onlinequant_backend.quantization.ranges import ActivationRange, freeze
from onlinequant_backend.quantization.weight_quantization import quantize_weight
from onlinequant_backend.selection import layer_timing

FORMATS = {"fp8": formats.FP8, "int8": formats.INT8}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A convolution: images, input and output channels, spatial sizes, kernel and stride; "same" padding."""

    model: str
    images: int
    inputs: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = (3, 3)
    stride: int = 1

    def __str__(self) -> str:
        numbers = ("x".join(map(str, numbers)) for numbers in (self.size, self.kernel))
        size, kernel = numbers
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.model} {self.images}x{size}, {self.inputs} -> {self.outputs}, {kernel}{stride}"

    @property
    def strides(self) -> list[int]:
        return [self.stride] * len(self.kernel)

    @property
    def padding(self) -> list[int]:
        return [size // 2 for size in self.kernel]

    @property
    def flops(self) -> int:
        pixels = math.prod(-(-size // self.stride) for size in self.size)
        return 2 * self.images * pixels * self.inputs * self.outputs * math.prod(self.kernel)


SHAPES = (
    *(
        Shape("SDXL", 2, inputs, outputs, (size, size))
        for inputs, outputs, size in (
            *((320, 320, 128), (640, 640, 64), (1280, 1280, 32), (2560, 1280, 32)),
            *((1920, 640, 64), (960, 320, 128), (1280, 1280, 64), (640, 640, 128)),
        )
    ),
    Shape("SDXL", 2, 320, 320, (128, 128), stride=2),
    Shape("SDXL", 2, 640, 640, (64, 64), stride=2),
    Shape("SDXL", 2, 640, 1280, (32, 32), kernel=(1, 1)),
    Shape("SDXL", 2, 2560, 1280, (32, 32), kernel=(1, 1)),
    Shape("SDXL", 2, 1920, 640, (64, 64), kernel=(1, 1)),
    Shape("SDXL", 2, 960, 320, (128, 128), kernel=(1, 1)),
    Shape("SD1.5", 2, 320, 320, (64, 64)),
    Shape("SD1.5", 2, 640, 640, (32, 32)),
    Shape("SD1.5", 2, 1280, 1280, (16, 16)),
    Shape("SD1.5", 2, 1280, 1280, (8, 8)),
    Shape("SD1.5", 2, 2560, 1280, (16, 16)),
    Shape("SD1.5", 2, 320, 320, (64, 64), stride=2),
    Shape("SD1.5", 2, 320, 320, (64, 64), kernel=(1, 1)),
    Shape("SVD", 50, 320, 320, (72, 128)),
    Shape("SVD", 50, 640, 640, (36, 64)),
    Shape("SVD", 50, 1280, 1280, (18, 32)),
    Shape("SVD", 50, 1280, 1280, (9, 16)),
    Shape("SVD", 50, 640, 640, (36, 64), stride=2),
    Shape("SVD", 2, 320, 320, (25, 72, 128), kernel=(3, 1, 1)),
    Shape("SVD", 2, 640, 640, (25, 36, 64), kernel=(3, 1, 1)),
    Shape("SVD", 2, 1280, 1280, (25, 18, 32), kernel=(3, 1, 1)),
    Shape("SVD", 2, 1280, 1280, (25, 9, 16), kernel=(3, 1, 1)),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One shape in one format: milliseconds of float16 and of 8 bit, and the latter's relative error."""

    shape: str
    format: str
    flops: int
    float_ms: float
    ms: float
    error: float

    @property
    def ratio(self) -> float:
        return self.float_ms / self.ms

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "ratio": self.ratio})


def milliseconds(function: Callable[[], Any]) -> float:
    """The median time of a call in a CUDA graph."""
    import triton.testing

    return float(triton.testing.do_bench_cudagraph(function, rep=40, return_mode="median"))


def layout(dimensions: int) -> torch.memory_format:
    """How the operands of a convolution lie in memory."""
    return torch.channels_last if dimensions == 4 else torch.channels_last_3d


def input_qparams(x: torch.Tensor, number_format: formats.Format) -> torch.Tensor:
    """The quantization parameters that observing ``x`` leads to."""
    observed = ActivationRange(float(x.amin()), float(x.amax()))
    # As a model lays them out: the scale at a multiple of 16 bytes, where cuBLAS reads it.
    return torch.empty(5, device=x.device)[2:].copy_(freeze(observed, number_format, "minmax"))


def operands(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, weight and bias in float16, channels last."""
    form = layout(2 + len(shape.size))
    x = torch.randn(shape.images, shape.inputs, *shape.size, device=device, dtype=torch.float16)
    weight = torch.randn(shape.outputs, shape.inputs, *shape.kernel, device=device, dtype=torch.float16)
    weight /= math.sqrt(shape.inputs * math.prod(shape.kernel))
    bias = torch.randn(shape.outputs, device=device, dtype=torch.float16)
    return x.contiguous(memory_format=form), weight.contiguous(memory_format=form), bias


def quantized(
    shape: Shape, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, number_format: formats.Format
) -> Callable[[], torch.Tensor]:
    """The convolution in 8 bit, of an input that is quantized already."""
    ones = (1,) * len(shape.kernel)
    geometry = ConvGeometry(tuple(shape.strides), tuple(shape.padding), ones)
    sizes: dict[str, Any] = {"input_shape": tuple(x.shape), "weight_shape": tuple(weight.shape)}
    layer_timing.tune(LayerInfo(str(shape), "conv", geometry=geometry, dtype=x.dtype, **sizes), number_format, x.device)
    qparams = input_qparams(x, number_format)
    xq = ops.quantize(x, qparams, number_format.activation, True)
    wq, scale = quantize_weight(weight, number_format)
    wq = wq.contiguous(memory_format=layout(wq.dim()))
    return lambda: ops.conv(xq, qparams, wq, scale, bias, shape.strides, shape.padding, ones, torch.float16)


def in_float(
    shape: Shape, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], ...]:
    """How cuDNN can compute the convolution."""
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d

    def as_laid_out() -> torch.Tensor:
        return convolve(x, weight, bias, shape.strides, shape.padding)

    if weight.dim() == 4:
        return (as_laid_out,)
    x_rows, weight_rows = x.contiguous(), weight.contiguous()
    return as_laid_out, lambda: convolve(x_rows, weight_rows, bias, shape.strides, shape.padding)


@torch.no_grad()
def measure(
    shape: Shape, names: Sequence[str], timer: Callable[[Callable[[], Any]], float], device: str
) -> list[Result]:
    """One shape in each format."""
    x, weight, bias = operands(shape, device)
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d
    expected = convolve(x.float(), weight.float(), bias.float(), shape.strides, shape.padding)
    float_ms = min(timer(function) for function in in_float(shape, x, weight, bias))
    results = []
    for name in names:
        function = quantized(shape, x, weight, bias, FORMATS[name])
        error = relative_error(function(), expected)
        results.append(Result(str(shape), name, shape.flops, float_ms, timer(function), error))
    return results


def table(title: str, results: Sequence[Result]) -> Table:
    """A row a shape, and the geometric mean of the ratios in the last."""
    result = Table(title=title)
    headings = ("", "GFLOP", "float16 us", "TFLOP/s", "8-bit us", "TFLOP/s", "speed-up", "relative error")
    for heading in headings:
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in results:
        result.add_row(
            row.shape,
            f"{row.flops / 1e9:.1f}",
            f"{1e3 * row.float_ms:.1f}",
            f"{row.flops / row.float_ms / 1e9:.0f}",
            f"{1e3 * row.ms:.1f}",
            f"{row.flops / row.ms / 1e9:.0f}",
            f"{row.ratio:.2f}x",
            f"{row.error:.4f}",
        )
    if results:
        result.add_section()
        mean = statistics.geometric_mean(row.ratio for row in results)
        result.add_row("geometric mean", "", "", "", "", "", f"{mean:.2f}x", "")
    return result


def run(
    title: str,
    shapes: Sequence[Any],
    measure_shape: Callable[[Any, Sequence[str], Callable[[Callable[[], Any]], float], str], list[Result]],
    description: str,
) -> None:
    """The command line that this benchmark and ``gpu_gemm`` share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", nargs="+", default=["fp8"], choices=list(FORMATS))
    parser.add_argument("--only", default="", help='shapes whose description holds this text, for instance "SVD"')
    parser.add_argument("--json", type=Path, help="append each result to this file, as one line, when it is finished")
    options = parser.parse_args()
    require_cuda()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    # The references are in float32, not in TF32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    results: list[Result] = []
    for shape in shapes:
        if options.only not in str(shape):
            continue
        print(f"measuring {shape}", file=sys.stderr, flush=True)
        try:
            done = measure_shape(shape, options.format, milliseconds, "cuda")
        except Exception as error:  # one shape that fails must not cost the others
            print(f"  failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        for result in done:
            print(f"  {result.format}: {result.ratio:.2f}x, error {result.error:.4f}", file=sys.stderr, flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(result.to_json() + "\n")
        results += done
    for name in options.format:
        chosen = [result for result in results if result.format == name]
        Console(width=140).print(table(f"{title}, {name}, {torch.cuda.get_device_name()}", chosen))


if __name__ == "__main__":
    run("Convolutions", SHAPES, measure, __doc__ or "")
