"""Compiles the Gluon convolution for a Hopper GPU, which need not be there; writes its PTX to the standard output.

    python tests/kernels/nvidia/compile_gluon.py '{"stride": 2}'

A process of its own, since Triton's interpreter, in which other tests run, knows no Gluon.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

sys.path.insert(0, str(Path(__file__).parents[3]))
from onlinequant_backend.kernels.nvidia import gluon_conv as kernels


def boxes(dtype: str, box: list[int], row_bytes: int, bits: int) -> str:
    """The type of a tensor descriptor."""
    return f"tensordesc<{dtype}{box},{kernels.swizzled(len(box), row_bytes, bits)!r}>"


def compiled(
    columns: int = 128,
    stages: int = 6,
    dtype: str = "fp8e4nv",
    out: str = "fp16",
    stride: int = 1,
    depth: int = 128,
    block: tuple[int, int, int] = (1, 8, 16),
    is_boxed: bool = True,
    has_more: bool = False,
) -> Any:
    """The kernel for blocks of 128 pixels. ``is_boxed``: stored by the TMA; ``has_more``: with bias, channel_add."""
    n, h, w = block
    kernel = kernels._gluon_conv_kernel
    types: dict[str, str] = dict.fromkeys(kernel.arg_names, "i32")
    types["x"] = boxes(dtype, [n, h, w, depth] if stride == 1 else [n, h, 1, w, depth], depth, 8)
    types["w"] = boxes(dtype, [columns, depth], depth, 8)
    types["out_boxes"] = boxes(out, [*kernels.half_of(block), 64], 128, 16)
    types |= {"out": f"*{out}", "scale": "*fp32", "weight_scale": "*fp32", "bias": f"*{out}", "channel_add": f"*{out}"}
    constants: dict[str, Any] = {"weight_stride": 1, "KERNEL_W": 3, "TAPS": 9, "BLOCK": tuple(block), "STAGES": stages}
    constants |= {"STRIDE": stride, "PARTS": 2}
    constants |= {} if has_more else {"bias": None, "channel_add": None}
    constants |= {} if is_boxed else {"out_boxes": None}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {"out", "scale", "weight_scale", "bias", "channel_add", "C", "K", "channel_stride"} - constants.keys()
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = GluonASTSource(
        fn=kernel,
        signature=types,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


if __name__ == "__main__":
    sys.stdout.write(compiled(**json.loads(sys.argv[1])).asm["ptx"])
