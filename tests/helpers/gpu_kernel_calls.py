"""Calls of the operators that launch every kernel of a GPU, and what Triton asks of a GPU that need not be there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from onlinequant_backend import ops
from onlinequant_backend.kernels.nvidia import group_norm, operators, tuning
from onlinequant_backend.kernels.nvidia.gpu import Gpu
from onlinequant_backend.kernels.nvidia.tuning import GATHER, GLUON, TMA, Tile

TILES = {
    "tma": Tile(TMA, 128, 128, 128, 8, 4),
    "gluon": Tile(GLUON, 128, 128, 128, 8, 6),
    "wide": Tile(GLUON, 128, 256, 128, 8, 4),
    "gather": Tile(GATHER, 128, 128, 64, 8, 3),
    "attention tma": Tile(TMA, 128, 128, 0, 8, 3),
    "attention gather": Tile(GATHER, 64, 64, 0, 4, 3),
    "split": Tile(TMA, 128, 128, 128, 8, 4, splits=2),
}


class Call(NamedTuple):
    """A call of the operator ``op``, which takes the tile of that name. ``family``: see ``families``."""

    name: str
    family: str
    op: str
    tile: str
    args: tuple[Any, ...]

    def make(self) -> None:
        with self.on_its_tile():
            ops.as_op(self.op, operators)(*self.args)

    def on_its_tile(self) -> contextlib.AbstractContextManager[object]:
        """Within the block, the operator takes the tile, in all threads."""
        return mock.patch.object(tuning, f"{self.op}_tile", mock.Mock(return_value=TILES.get(self.tile)), create=True)


class Driver:
    """What Triton asks of a GPU of this compute capability."""

    def __init__(self, capability: int = 90) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.launchers: list[object] = []  # of which kernels one was made

    def get_current_device(self) -> int:
        return int(self._target.arch)  # Triton remembers each device's target

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def launcher_cls(self, src: object, _metadata: object) -> None:
        self.launchers.append(src)


@contextlib.contextmanager
def pretended_gpu(driver: Driver, gpu: Gpu) -> Iterator[None]:
    """Within the block, Triton compiles for ``gpu``, and tensors of the CPU stand for its own."""
    triton.runtime.driver.set_active(driver)
    launchers: list[ModuleType] = [group_norm]
    if gpu.has_gluon:  # else it may not be possible to import it
        from onlinequant_backend.kernels.nvidia import gluon_conv

        launchers.append(gluon_conv)
    with contextlib.ExitStack() as stack:
        for module in launchers:
            stack.enter_context(mock.patch.object(module, "processors", return_value=gpu.processors))
        stack.enter_context(mock.patch.object(torch.cuda, "device", contextlib.nullcontext))
        stack.enter_context(mock.patch.object(operators, "gpu_of", return_value=gpu))
        yield


def calls(dtype: torch.dtype) -> Iterator[Call]:
    """Calls with 8-bit operands of ``dtype``."""
    yield from _matmuls(dtype)
    yield from _convolutions(dtype)
    yield from _norms(dtype)
    yield from _attentions(dtype)


def _matmuls(dtype: torch.dtype) -> Iterator[Call]:
    qparams, half = _qparams(), torch.float16
    x, weight, bias = torch.zeros(4, 50, 128, dtype=dtype), torch.zeros(320, 128, dtype=dtype), torch.zeros(320).half()
    yield Call("linear tma", "TMA matmul", "linear", "tma", (x, qparams, weight, torch.ones(1), bias, half))
    yield Call("linear gather", "gather matmul", "linear", "gather", (x, qparams, weight, torch.ones(1), None, half))
    operands = (x, qparams, weight, torch.ones(1), bias, qparams, dtype)
    yield Call("geglu tma", "TMA matmul with GEGLU", "geglu", "tma", operands)


def _convolutions(dtype: torch.dtype) -> Iterator[Call]:
    half, layout = torch.float16, torch.channels_last
    image = torch.zeros(2, 128, 16, 24, dtype=dtype).to(memory_format=layout)
    kernel = torch.zeros(64, 128, 3, 3, dtype=dtype).to(memory_format=layout)
    operands = (image, _qparams(), kernel, torch.ones(64), torch.zeros(64, dtype=half))
    residual = torch.zeros(2, 64, 16, 24, dtype=half).to(memory_format=layout)
    # A part of a longer product, as the time embeddings' are.
    added = torch.zeros(2, 256, dtype=half)[:, 64:128]
    same, halved = ([1, 1], [1, 1], [1, 1]), ([2, 2], [1, 1], [1, 1])
    families = dict.fromkeys(("tma", "split"), "TMA convolutions") | {"gather": "gather convolutions"}
    families |= dict.fromkeys(("gluon", "wide"), "Gluon convolutions")
    for tile, family in families.items():
        yield Call(f"conv {tile}", family, "conv", tile, (*operands, *same, half))
    for tile in ("tma", "gluon"):
        yield Call(f"conv {tile} stride", families[tile], "conv", tile, (*operands, *halved, half))
    yield Call("conv tma more", families["tma"], "conv", "tma", (*operands, *same, half, residual, added))
    yield Call("conv gluon more", families["gluon"], "conv", "gluon", (*operands, *same, half, None, added))
    yield Call("conv gluon float32", families["gluon"], "conv", "gluon", (*operands, *same, torch.float32))


def _norms(dtype: torch.dtype) -> Iterator[Call]:
    half, qparams = torch.float16, _qparams()
    rows = torch.zeros(2, 50, 640, dtype=half)
    norm = (torch.ones(640, dtype=half), torch.zeros(640, dtype=half), 1e-5)
    yield Call("layer_norm", "LayerNorm", "layer_norm", "", (rows, None, *norm, qparams, dtype))
    yield Call("layer_norm sum", "LayerNorm", "layer_norm", "", (rows, rows.clone(), *norm, qparams, dtype))
    for name, size in (("one kernel", 4), ("three kernels", 128)):
        pixels = torch.zeros(2, 64, size, size, dtype=half).to(memory_format=torch.channels_last)
        affine = (torch.ones(64, dtype=half), torch.zeros(64, dtype=half), 1e-5)
        args = (pixels, 32, *affine, True, qparams, dtype)
        yield Call(f"group_norm {name}", "GroupNorm", "group_norm", "", args)


def _attentions(dtype: torch.dtype) -> Iterator[Call]:
    format = "fp8" if dtype.is_floating_point else "int8"
    for tile, family in (("attention tma", "TMA attention"), ("attention gather", "gather attention")):
        # As a linear layer gives them, in two parts with a tail, and in one part without.
        for name, tokens, size in (("two parts", 200, 80), ("one part", 256, 64)):
            q, k, v = (torch.zeros(2, tokens, 4, size, dtype=torch.float16).transpose(1, 2) for _ in range(3))
            yield Call(f"{tile} {name}", family, "attention", tile, (q, k, v, 0.1, format))
    q, k, v = (torch.zeros(9, 25, 4, 64, dtype=torch.float16).transpose(1, 2) for _ in range(3))
    yield Call("attention short", "short attention", "attention", "attention gather", (q, k, v, 0.1, format))


def checks() -> dict[str, Callable[[], object]]:
    """The kernels that no operator launches: those that look for changed inputs and weights."""
    from onlinequant_backend.kernels.nvidia.bounds_check import BoundsCheck
    from onlinequant_backend.kernels.nvidia.snapshot import Samples

    values, cpu = torch.zeros(1024), torch.device("cpu")
    return {
        "bounds": lambda: BoundsCheck(1, cpu).begin([values], [(0.0, 1.0, 0.5)]),
        **{
            f"snapshot of {dtype}": lambda dtype=dtype: Samples([values.to(dtype)]).begin()  # type: ignore[misc]
            for dtype in (torch.float32, torch.float16, torch.int8)
        },
    }


def _qparams() -> torch.Tensor:
    return torch.ones(5)[2:]  # as a layer has them
