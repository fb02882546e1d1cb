"""Which kernels are compiled ahead for calls of operators, and which these ask for, on a GPU that need not be there.

    python tests/kernels/nvidia/compile_ahead.py

Prints JSON: by case, the names of the kernels, and of those that differ. A process of its own, since Triton's
interpreter, in which other tests run, compiles nothing. Nor does this: what would be compiled is noted.
"""

from __future__ import annotations

import contextlib
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
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parents[3]))
from onlinequant_backend import ops
from onlinequant_backend.graph import ConvGeometry, LayerInfo
from onlinequant_backend.kernels import formats
from onlinequant_backend.kernels.nvidia import gluon_conv, gpu, group_norm, operators, precompile, tuning
from onlinequant_backend.kernels.nvidia.tuning import GATHER, GLUON, TMA, Tile
from onlinequant_backend.selection.layer_trial import Trial

FP8 = torch.float8_e4m3fn
HOPPER = gpu.Gpu("a GPU", 132, has_tma=True, has_gluon=True)
TILES = {
    "tma": Tile(TMA, 128, 128, 128, 8, 4),
    "gluon": Tile(GLUON, 128, 128, 128, 8, 6),
    "gather": Tile(GATHER, 128, 128, 64, 8, 3),
    "split": Tile(TMA, 128, 128, 128, 8, 4, splits=2),
}


class Driver:
    """What Triton asks of a Hopper GPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, src: str, _metadata: object) -> None:
        launchers.append(src)


class Compiled:
    """What Triton makes of a kernel."""

    def __init__(self, name: str) -> None:
        self.src = name
        self.metadata = None


launchers: list[str] = []  # that were made


def cases() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Names, operators and arguments."""
    qparams = torch.ones(5)[2:]  # as a layer has them
    half = torch.float16
    x, weight = torch.zeros(4, 50, 128, dtype=FP8), torch.zeros(320, 128, dtype=FP8)
    yield "linear tma", "linear", (x, qparams, weight, torch.ones(1), torch.zeros(320, dtype=half), half)
    yield "linear gather", "linear", (x, qparams, weight, torch.ones(1), None, half)
    yield "geglu tma", "geglu", (x, qparams, weight, torch.ones(1), torch.zeros(320, dtype=half), qparams, FP8)
    image = torch.zeros(2, 128, 16, 24, dtype=FP8).to(memory_format=torch.channels_last)
    kernel = torch.zeros(64, 128, 3, 3, dtype=FP8).to(memory_format=torch.channels_last)
    operands = (image, qparams, kernel, torch.ones(64), torch.zeros(64, dtype=half))
    residual = torch.zeros(2, 64, 16, 24, dtype=half).to(memory_format=torch.channels_last)
    geometry = ([1, 1], [1, 1], [1, 1])
    for name in TILES:
        yield f"conv {name}", "conv", (*operands, *geometry, half)
    for name in ("tma", "gluon"):
        yield f"conv {name} stride", "conv", (*operands, [2, 2], [1, 1], [1, 1], half)
    # A part of a longer product, as the time embeddings' are.
    added = torch.zeros(2, 256, dtype=half)[:, 64:128]
    yield "conv tma more", "conv", (*operands, *geometry, half, residual, added)
    rows = torch.zeros(2, 50, 640, dtype=half)
    norm = (torch.ones(640, dtype=half), torch.zeros(640, dtype=half), 1e-5)
    yield "layer_norm", "layer_norm", (rows, None, *norm, qparams, FP8)
    yield "layer_norm sum", "layer_norm", (rows, rows.clone(), *norm, qparams, FP8)
    for name, size in (("one kernel", 4), ("three kernels", 128)):
        pixels = torch.zeros(2, 64, size, size, dtype=half).to(memory_format=torch.channels_last)
        affine = (torch.ones(64, dtype=half), torch.zeros(64, dtype=half), 1e-5)
        yield f"group_norm {name}", "group_norm", (pixels, 32, *affine, True, qparams, FP8)


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

    def fakes_called(name: str, args: tuple[Any, ...]) -> set[tuple[str, str]]:
        wanted.clear()
        with FakeTensorMode() as mode, ThreadPoolExecutor(1) as pool:
            precompile._local.calls = precompile._Calls(device, pool)
            fakes = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            getattr(ops, name)(*fakes)
        return set(wanted)

    triton.runtime.driver.set_active(Driver())
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (triton.runtime.JITFunction, "_do_compile", note),
            (torch.cuda, "device", contextlib.nullcontext),
            (group_norm, "processors", lambda _device: 132),
            (gluon_conv, "processors", lambda _device: 132),
            (operators, "gpu_of", lambda _device: HOPPER),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        found = {}
        for case, name, args in cases():
            tile = TILES.get(([*case.split(), ""])[1])
            stack.enter_context(mock.patch.object(tuning, f"{name}_tile", lambda *_, tile=tile: tile, create=True))
            real, made = called(ops.as_op(name, operators), *args), fakes_called(name, args)
            found[case] = [names(real), names(real ^ made)]
            assert set(launchers) >= set(names(real)), launchers
        for info, tile in trials():
            real, made = (called(Trial(info, formats.FP8, place).run, tile) for place in (device, precompile.NOWHERE))
            found[f"trial of a {info.kind}"] = [names(real), names(real ^ made)]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
