"""Which kernels are compiled ahead for calls of operators, and which these ask for, on a GPU that need not be there.

    python tests/kernels/nvidia/compile_ahead.py

Prints JSON: by case, the names of the kernels, and of those that differ. A process of its own, since Triton's
interpreter, in which other tests run, compiles nothing. Nor does this: what would be compiled is noted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[3]))
from onlinequant_backend import ops
from onlinequant_backend.graph import ConvGeometry, LayerInfo
from onlinequant_backend.kernels import formats
from onlinequant_backend.kernels.nvidia import gpu, precompile
from onlinequant_backend.kernels.nvidia.tuning import Tile
from onlinequant_backend.selection.layer_trial import Trial
from tests.helpers.gpu_kernel_calls import TILES, Call, Driver, calls, pretended_gpu

FP8 = torch.float8_e4m3fn
HOPPER = gpu.Gpu("a GPU", 132, has_tma=True, has_gluon=True)


class Compiled:
    """What Triton makes of a kernel."""

    def __init__(self, name: str) -> None:
        self.src = name
        self.metadata = None


def trials() -> Iterator[tuple[LayerInfo, Tile]]:
    """Layers that are timed."""
    linear = LayerInfo("layer", "linear", input_shape=(2, 48, 128), weight_shape=(320, 128), dtype=torch.float16)
    yield linear, TILES["tma"]
    shapes = {"input_shape": (2, 128, 8, 8), "weight_shape": (64, 128, 3, 3)}
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1))
    yield LayerInfo("layer", "conv", geometry=geometry, dtype=torch.float16, **shapes), TILES["gluon"]


def names(kernels: set[tuple[str, str]]) -> list[str]:
    return sorted(kernel for kernel, _ in kernels)


def main() -> None:
    wanted: set[tuple[str, str]] = set()
    device = torch.device("cpu")  # of the tensors that stand for the GPU's

    def note(kernel: Any, key: Any, *_: Any) -> object:
        wanted.add((kernel.fn.__name__, str(key)))
        return Compiled(kernel.fn.__name__)

    def called(call: Any, *args: Any) -> set[tuple[str, str]]:
        wanted.clear()
        with precompile.on(device):
            call(*args)
        return set(wanted)

    def fakes_called(call: Call) -> set[tuple[str, str]]:
        wanted.clear()
        with call.on_its_tile(), FakeTensorMode() as mode, ThreadPoolExecutor(1) as pool:
            precompile._local.calls = precompile._Calls(device, pool)
            fakes = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in call.args]
            getattr(ops, call.op)(*fakes)
        return set(wanted)

    driver = Driver()
    with pretended_gpu(driver, HOPPER), mock.patch.object(triton.runtime.JITFunction, "_do_compile", note):
        found = {}
        for call in calls(FP8):
            real, made = called(call.make), fakes_called(call)
            found[call.name] = [names(real), names(real ^ made)]
            assert set(driver.launchers) >= set(names(real)), driver.launchers
        for info, tile in trials():
            real, made = (called(Trial(info, formats.FP8, place).run, tile) for place in (device, precompile.NOWHERE))
            found[f"trial of a {info.kind}"] = [names(real), names(real ^ made)]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
