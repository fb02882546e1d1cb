"""8-bit linear layers against cuBLAS's in float16, at the shapes of SDXL, SD1.5 and SVD, on an NVIDIA GPU.

    python benchmarks/gpu_gemm.py --format fp8 int8

Timed as in ``gpu_conv``. The GEGLU rows are ``onlinequant::geglu``, against a linear layer in float16 followed by GELU
and a product, compiled by Inductor.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.gpu_conv import FORMATS, Result, input_qparams, run
from benchmarks.models import relative_error
from onlinequant_backend import ops
from onlinequant_backend.graph import LayerInfo
from onlinequant_backend.quantization.weight_quantization import quantize_weight
from onlinequant_backend.selection import layer_timing


@dataclasses.dataclass(frozen=True)
class Shape:
    """A linear layer: rows of its input, input and output features, and whether GEGLU follows."""

    model: str
    rows: int
    inputs: int
    outputs: int
    geglu: bool = False

    def __str__(self) -> str:
        return f"{self.model} {self.rows} rows, {self.inputs} -> {self.outputs}{' GEGLU' if self.geglu else ''}"

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


SHAPES = (
    *(
        Shape("SDXL", *sizes)
        for sizes in (
            *((8192, 640, 640), (8192, 640, 1920), (8192, 640, 5120), (8192, 2560, 640)),
            *((2048, 1280, 1280), (2048, 1280, 3840), (2048, 1280, 10240), (2048, 5120, 1280)),
            *((154, 2048, 640), (154, 2048, 1280)),
        )
    ),
    Shape("SDXL", 8192, 640, 5120, geglu=True),
    Shape("SDXL", 2048, 1280, 10240, geglu=True),
    Shape("SD1.5", 8192, 320, 320),
    Shape("SD1.5", 8192, 320, 2560),
    Shape("SD1.5", 8192, 1280, 320),
    Shape("SD1.5", 2048, 640, 5120),
    Shape("SD1.5", 512, 1280, 10240),
    Shape("SD1.5", 512, 5120, 1280),
    Shape("SVD", 460800, 320, 320),
    Shape("SVD", 460800, 320, 2560),
    Shape("SVD", 115200, 640, 5120),
    Shape("SVD", 28800, 1280, 10240),
    Shape("SVD", 28800, 5120, 1280),
)


def geglu(y: torch.Tensor) -> torch.Tensor:
    """The first half of the columns times GELU of the second."""
    value, gate = y.chunk(2, dim=-1)
    return value * F.gelu(gate)


@torch.no_grad()
def measure(
    shape: Shape, names: Sequence[str], timer: Callable[[Callable[[], Any]], float], device: str
) -> list[Result]:
    """One shape in each format."""
    x = torch.randn(shape.rows, shape.inputs, device=device, dtype=torch.float16)
    weight = torch.randn(shape.outputs, shape.inputs, device=device, dtype=torch.float16) / math.sqrt(shape.inputs)
    bias = torch.randn(shape.outputs, device=device, dtype=torch.float16)
    expected = F.linear(x.float(), weight.float(), bias.float())
    if shape.geglu:
        expected = geglu(expected)
    activate = torch.compile(geglu, dynamic=False) if shape.geglu else (lambda y: y)
    float_ms = timer(lambda: activate(F.linear(x, weight, bias)))
    results = []
    for name in names:
        number_format = FORMATS[name]
        sizes: dict[str, Any] = {"input_shape": tuple(x.shape), "weight_shape": tuple(weight.shape)}
        layer_timing.tune(LayerInfo(str(shape), "linear", dtype=x.dtype, **sizes), number_format, x.device)
        qparams = input_qparams(x, number_format)
        xq = ops.quantize(x, qparams, number_format.activation, False)
        wq, scale = quantize_weight(weight, number_format)

        def step(
            xq: torch.Tensor = xq, qparams: torch.Tensor = qparams, wq: torch.Tensor = wq, scale: torch.Tensor = scale
        ) -> torch.Tensor:
            if shape.geglu:
                return ops.geglu(xq, qparams, wq, scale, bias, None, torch.float16)
            return ops.linear(xq, qparams, wq, scale, bias, torch.float16)

        error = relative_error(step(), expected)
        results.append(Result(str(shape), name, shape.flops, float_ms, timer(step), error))
    return results


if __name__ == "__main__":
    run("Linear layers", SHAPES, measure, __doc__ or "")
