"""Kernels of one translation unit are the kernels that torch would compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch._inductor.codecache import CppPythonBindingsCodeCache

from onlinequant_backend.compilation.inductor_job import caches_in
from onlinequant_backend.torch_internals import batched_cpp, inductor_interface
from tests.helpers.tiny import noise, relative_error

X = noise(6, 40, 8)
NAMES = ("exp", "sin", "cos", "tanh", "sigmoid", "erf")


def many_kernels(x: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A reduction for each function, which Inductor cannot fuse with those of other rows; and one of integers."""
    rows = [getattr(torch, name)(x[index] * length).cumsum(0) for index, name in enumerate(NAMES)]
    return (*rows, x.argmax(0))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all batches; each is as large as it can be."""
    sizes: list[int] = []
    begin = batched_cpp._begin
    monkeypatch.setattr(batched_cpp, "_begin", lambda batch: (sizes.append(len(batch)), begin(batch)))
    monkeypatch.setattr(batched_cpp, "_split", lambda kernels: [list(kernels)] if kernels else [])
    monkeypatch.setattr(batched_cpp, "get_compile_threads", lambda: 2)
    monkeypatch.setattr("torch._inductor.async_compile.get_compile_threads", lambda: 2)
    return sizes


def compiled(function: Callable[..., Any], *inputs: torch.Tensor) -> Callable[..., Sequence[torch.Tensor]]:
    with caches_in(None), torch.no_grad():
        module = fx.symbolic_trace(function)
        result: Callable[..., Sequence[torch.Tensor]] = inductor_interface.compile_fx(
            module, list(inputs), {"max_fusion_size": 1}, outside_dynamo=True
        )
    return result


def check(step: Callable[..., Sequence[torch.Tensor]]) -> None:
    inputs = (X, torch.tensor(0.5))
    for result, expected in zip(step(*inputs), many_kernels(*inputs), strict=True):
        assert relative_error(result, expected) < 1e-5


def test_a_batch_computes_what_its_kernels_do(batches: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "onlinequant")
    check(compiled(many_kernels, X, torch.tensor(0.5)))
    assert max(batches) >= len(NAMES)
    assert "separately" not in caplog.text and "one by one" not in caplog.text


def test_a_batch_that_cannot_be_compiled_is_compiled_one_by_one(
    batches: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "onlinequant")
    monkeypatch.setattr(batched_cpp, "_HEADERS", "#error broken on purpose\n")
    check(compiled(many_kernels, X, torch.tensor(0.5)))
    assert max(batches) >= len(NAMES) and caplog.text.count("compiled separately") == 1


def test_another_version_of_torch_compiles_them_one_by_one(
    batches: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "onlinequant")
    monkeypatch.setattr(CppPythonBindingsCodeCache, "suffix_template", "{something_new}")
    begun: list[str] = []
    monkeypatch.setattr(batched_cpp, "_one_by_one", lambda compiler, types, code: begun.append(code))
    batched_cpp._begin([batched_cpp._Kernel(None, ["float*"], KERNEL) for _ in range(3)])
    assert "compiled one by one" in caplog.text and begun == [KERNEL] * 3


KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const float* in_ptr0,
                       float* out_ptr0)
{
    {
        out_ptr0[0] = in_ptr0[0];
    }
}
"""


@pytest.mark.parametrize(
    "code",
    [
        KERNEL.replace("extern", "template <int n> struct S {};\nextern"),
        KERNEL.replace("extern", "#include <ATen/record_function.h>\nextern"),
        KERNEL.replace("void  kernel", "void  other"),
        KERNEL + "int after;",
        KERNEL + 'extern "C" void other(float* x) {\n}\n',
        KERNEL + "#define FOO {1}\n",
        KERNEL.replace("    {\n", "#define FOO 1\n    {\n"),
        KERNEL + KERNEL,
    ],
    ids=["template", "include", "other name", "variable", "function", "macro", "macro inside", "two kernels"],
)
def test_a_source_that_is_more_than_a_kernel_is_left_to_torch(code: str) -> None:
    assert batched_cpp._KERNEL.fullmatch(KERNEL) is not None
    assert batched_cpp._KERNEL.fullmatch(code) is None


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (5, [1] * 5), (15, [1] * 15), (16, [8, 8]), (20, [8, 8, 4])])
def test_few_kernels_are_compiled_one_by_one(count: int, sizes: list[int]) -> None:
    kernels = [batched_cpp._Kernel(None, [], KERNEL) for _ in range(count)]
    split = list(batched_cpp._split(kernels))
    assert [len(batch) for batch in split] == sizes
    assert [kernel for batch in split for kernel in batch] == kernels
