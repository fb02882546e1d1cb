"""Compiles all kernels for GPUs that need not be there, by the Triton that is found.

    python tests/kernels/nvidia/compile_kernels.py [--fusion] 8.9 9.0

Prints JSON: Triton's version and, by compute capability and family of kernels, an ``Outcome``. ``--fusion`` compiles
each kernel with other settings of floating-point fusion, too. A process of its own, since Triton's interpreter, in
which other tests run, compiles nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# Digests are of code without line numbers, which change with every comment.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "0")
import triton

sys.path.insert(0, str(Path(__file__).parents[3]))
from onlinequant_backend.kernels.nvidia import families, launch, precompile
from onlinequant_backend.kernels.nvidia.gpu import Gpu
from tests.helpers.gpu_kernel_calls import Driver, calls, checks, pretended_gpu

INT8, FP8 = torch.int8, torch.float8_e4m3fn


@dataclasses.dataclass
class Outcome:
    """What became of a family.

    Attributes:
        off: why it is not for this GPU and Triton; then nothing is compiled.
        compiled: digests of the kernels' PTX, by call and kernel.
        failed: errors, by call.
        by_default: kernels that are other code if floating-point fusion is left to Triton's default.
        by_opposite: kernels that are other code with the opposite of what ``launch`` asks for.
    """

    off: str | None = None
    compiled: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    by_default: set[str] = dataclasses.field(default_factory=set)
    by_opposite: set[str] = dataclasses.field(default_factory=set)

    def call(self, name: str, run: Callable[[], object], is_fusion_compared: bool) -> None:
        """Have ``run`` compile its kernels."""

        def compile_and_compare(
            kernel: Any, grid: tuple[int, ...], *args: Any, enable_fp_fusion: bool, **options: Any
        ) -> None:
            def code(**fusion: bool) -> str:
                return kernel.warmup(*args, grid=grid, **options, **fusion).asm["ptx"]

            ptx, kernel_name = code(enable_fp_fusion=enable_fp_fusion), kernel.fn.__name__
            self.compiled[f"{name}: {kernel_name}"] = hashlib.sha256(ptx.encode()).hexdigest()
            if is_fusion_compared and code() != ptx:
                self.by_default.add(kernel_name)
            if is_fusion_compared and code(enable_fp_fusion=not enable_fp_fusion) != ptx:
                self.by_opposite.add(kernel_name)

        try:
            with mock.patch.object(launch, "_compile", compile_and_compare), precompile.on(torch.device("cpu")):
                run()
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"


def compile_all(capability: tuple[int, int], is_fusion_compared: bool) -> dict[str, Outcome]:
    major, minor = capability
    found = {family: Outcome(reason) for family, reason in families.families(capability).items()}
    has_tma, has_gluon = families.without_tma(capability) is None, families.without_gluon(capability) is None
    gpu = Gpu("a GPU", 132, has_tma, has_gluon)
    with pretended_gpu(Driver(10 * major + minor), gpu):
        for family, name, run in runs(capability):
            if found[family].off is None:
                found[family].call(name, run, is_fusion_compared)
    return found


def runs(capability: tuple[int, int]) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Families, names and calls."""
    for dtype in (INT8, FP8) if capability >= (8, 9) else (INT8,):
        for call in calls(dtype):
            yield call.family, f"{call.name} {dtype}", call.make
    for name, check in checks().items():
        yield "checks for changes", name, check


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capabilities", nargs="+")
    parser.add_argument("--fusion", action="store_true")
    args = parser.parse_args()
    found = {}
    for text in args.capabilities:
        major, minor = map(int, text.split("."))
        outcomes = compile_all((major, minor), args.fusion)
        found[text] = {family: dataclasses.asdict(outcome) for family, outcome in outcomes.items()}
    sys.stdout.write(json.dumps({"triton": triton.__version__, "found": found}, default=sorted) + "\n")


if __name__ == "__main__":
    main()
