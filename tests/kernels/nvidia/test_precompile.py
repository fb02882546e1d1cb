"""Kernels that are compiled before they are needed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from onlinequant_backend import ops
from onlinequant_backend.kernels.nvidia import families, gpu, launch, operators, precompile
from onlinequant_backend.kernels.nvidia.tuning import CUBLAS, Tile
from onlinequant_backend.kernels.operands import Operands

CPU = torch.device("cpu")


@contextlib.contextmanager
def compiling(kernel: Any) -> Iterator[Any]:
    """A fake that takes part, on the CPU."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(precompile, "on", lambda _device: contextlib.nullcontext())
        patch.setattr(precompile._local, "calls", precompile._Calls(CPU, pool), raising=False)
        yield precompile.noted(lambda x, *_rest: x, kernel)


def test_each_kind_of_call_is_made_once_with_tensors_like_those() -> None:
    seen = []

    def kernel(x: torch.Tensor, number: int, other: torch.Tensor | None) -> None:
        assert x.device == precompile.NOWHERE
        seen.append((tuple(x.shape), x.stride(), x.dtype, number, other, type(x)))

    with compiling(kernel) as fake, FakeTensorMode():
        x = torch.empty(2, 3, 4, 5, dtype=torch.int8).to(memory_format=torch.channels_last)
        for number in (1, 1, 2):
            assert fake(x, number, None) is x
    shape = ((2, 3, 4, 5), x.stride(), torch.int8)
    assert sorted(seen, key=str) == [(*shape, number, None, torch.Tensor) for number in (1, 2)]


def test_tensors_are_aligned_as_those_will_be() -> None:
    seen = []
    with compiling(lambda x: seen.append((x.shape, x.stride(), x.data_ptr() % 16))) as fake, FakeTensorMode() as mode:
        for real in (torch.empty(5)[2:], torch.empty(5)[:3], torch.empty(4, 6)[1:, ::2]):
            fake(mode.from_tensor(real))
        fake(torch.empty(2**43))  # nobody has so much memory
    found = sorted((tuple(shape), stride, offset) for shape, stride, offset in seen)
    assert found == [((3,), (1,), 0), ((3,), (1,), 8), ((3, 3), (6, 2), 8), ((2**43,), (1,), 0)]


def test_a_kernel_that_fails_disturbs_nobody() -> None:
    def kernel(_x: torch.Tensor) -> None:
        raise RuntimeError("out of resources")

    with compiling(kernel) as fake, FakeTensorMode():
        x = torch.empty(3)
        assert fake(x) is x


def test_symbolic_tensors_and_those_elsewhere_are_left_alone() -> None:
    seen: list[torch.Tensor] = []
    real = torch.zeros(4)
    with compiling(seen.append) as fake:
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            context, source = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC]), ConstantSource("x")
            x = mode.from_tensor(real, static_shapes=False, symbolic_context=context, source=source)
            fake(x)
            fake(x[x.shape[0] - 1 :][:1])
            fake(x.as_strided((2,), (1,), x.shape[0] - 2))
        fake(torch.empty(3, device="meta"))
    assert not seen


def test_without_a_gpu_nothing_is_called() -> None:
    seen: list[Any] = []
    with precompile.compiling_ahead(CPU):
        precompile.noted(lambda x: x, seen.append)(torch.zeros(3))
    precompile.noted(lambda x: x, seen.append)(torch.zeros(3))
    assert not seen


def test_cublas_is_not_called_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: pytest.fail("it was called"))
    rows, weight = torch.zeros(32, 64, dtype=torch.float8_e4m3fn), torch.zeros(16, 64, dtype=torch.float8_e4m3fn)
    with precompile.on(CPU):
        assert precompile.is_ahead()
        given = Operands(rows, torch.ones(3), weight, torch.ones(1), None)
        result = operators.run_linear(given, torch.float16, Tile(CUBLAS))
    assert (result.shape, result.dtype, precompile.is_ahead()) == ((32, 16), torch.float16, False)


def test_operators_take_part() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        calls = precompile._Calls(CPU, pool)
        added: list[str] = []
        patch.setattr(calls, "add", lambda kernel, _args: added.append(kernel.__name__))
        patch.setattr(precompile._local, "calls", calls, raising=False)
        with FakeTensorMode():
            xq, weight = torch.empty(4, 32, dtype=torch.int8), torch.empty(16, 32, dtype=torch.int8)
            ops.linear(xq, torch.empty(3), weight, torch.empty(16), None, torch.float32)
    assert added == ["linear"]


def test_tensors_that_are_nowhere_are_for_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_gpu", lambda device: gpu.NONE._replace(processors=100 + device.index))
    found = [launch.processors(torch.device(name)) for name in ("cpu", "cuda:1", "cuda", "meta")]
    assert found == [1, 101, 103, 103]


@pytest.mark.skipif(families.missing_gluon() is not None, reason=str(families.missing_gluon()))
def test_what_is_compiled_ahead_is_what_calls_ask_for() -> None:
    script = Path(__file__).with_name("compile_ahead.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, str(script)], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert {case: different for case, (_, different) in found.items() if different} == {}
    assert [case for case, (kernels, _) in found.items() if not kernels] == []
    assert {kernel for kernels, _ in found.values() for kernel in kernels} == {
        *("_matmul_kernel", "_geglu_kernel", "_conv_kernel", "_gluon_conv_kernel", "_add_up_kernel", "_gather_kernel"),
        *("_layer_norm_kernel", "_group_kernel", "_sum_kernel", "_combine_kernel", "_apply_kernel"),
        *("_attention_kernel", "_prepare_kernel", "_short_attention_kernel"),
    }


def test_threads_import_nothing_of_tritons() -> None:
    """Two that do at the same time may wait for each other's modules, of which Python lets one fail."""
    script = """
import sys
from onlinequant_backend.kernels.nvidia import precompile
precompile.threads()
known = set(sys.modules)
from onlinequant_backend.kernels.nvidia import conv, gather, group_norm, layer_norm, matmul, operators
try:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from onlinequant_backend.kernels.nvidia import gluon_conv
except ImportError:
    pass
print([name for name in sys.modules if name not in known and name.startswith(("triton", "onlinequant"))])
"""
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_kernels_are_called_by_other_threads() -> None:
    device, seen = torch.device("cuda", 0), []
    with precompile.compiling_ahead(device), FakeTensorMode():
        x = torch.empty(3, device=device)
        precompile.noted(lambda x: x, lambda x: seen.append((x.device, x.is_inference())))(x)
    assert seen == [(precompile.NOWHERE, False)]
