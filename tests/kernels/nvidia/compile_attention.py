"""What attention takes of GPUs that need not be there, on its default tiles.

    python tests/kernels/nvidia/compile_attention.py 8.9 9.0

Prints JSON: for each compute capability, format and size of a head, and each kernel, its warps, registers of a thread,
bytes of these that are spilled, and bytes of shared memory. A process of its own, since Triton's interpreter, in which
other tests run, compiles nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[3]))
from onlinequant_backend.kernels import formats
from onlinequant_backend.kernels.nvidia import launch, precompile, tuning
from onlinequant_backend.kernels.nvidia.attention import attention
from onlinequant_backend.kernels.nvidia.gpu import Gpu
from tests.helpers.gpu_kernel_calls import Driver, pretended_gpu

SIZES = (40, 64, 80, 96, 128, 160)
TOKENS = 1000  # no multiple of any block: a tail takes registers, too


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which only what is spilled takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    registers, stack = re.findall(r"(?:REG|STACK):(\d+)", answer)
    return int(registers), int(stack)


def compiled(gpu: Gpu, format: str, size: int) -> list[list[Any]]:
    """Name, warps, registers, spilled and shared memory of each kernel."""
    found = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        result = kernel.warmup(*args, grid=grid, **options)
        registers, spilled = usage(result.asm["cubin"])
        found.append([kernel.fn.__name__, options["num_warps"], registers, spilled, result.metadata.shared])

    q, k, v = (torch.zeros(2, TOKENS, 4, size, dtype=torch.float16).transpose(1, 2) for _ in range(3))
    out, dtype = torch.empty(2, TOKENS, 4, size, dtype=torch.float16), formats.attention_dtype(format)
    tile = tuning.attention_tile(8, TOKENS, TOKENS, size, dtype, gpu)
    with mock.patch.object(launch, "_compile", note), precompile.on(torch.device("cpu")):
        attention(q, k, v, 0.1, dtype, out, tile)
    return found


def main() -> None:
    found = []
    for text in sys.argv[1:]:
        major, minor = map(int, text.split("."))
        # With one processor no programs are too few for the default tile.
        gpu = Gpu("a GPU", 1, has_tma=major >= 9, has_gluon=False)
        with pretended_gpu(Driver(10 * major + minor), gpu):
            for format in ("int8", "fp8") if (major, minor) >= (8, 9) else ("int8",):
                for size in SIZES:
                    found += [[text, format, size, *kernel] for kernel in compiled(gpu, format, size)]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
