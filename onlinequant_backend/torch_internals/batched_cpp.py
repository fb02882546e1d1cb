"""Compiles several of Inductor's C++ kernels in one translation unit: much of a compile is parsing headers. Inductor
compiles each CPU kernel separately, in about two seconds, of which the kernel's own code takes half. This uses torch's
internals: kernels of unexpected form are compiled in torch's own way.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache, LambdaFuture

_log = logging.getLogger("onlinequant")

# Kernels per batch, independent of the number of processors, so that cached libraries are found with any number; larger
# batches would keep one processor busy when all others are idle. Graphs of fewer than two batches are compiled one by
# one.
_BATCH = 8
_INCLUDE = "#include <torch/csrc/inductor/cpp_prefix.h>"
# A source with only one function, whose brace is the only one at the beginning of a line. (Sources from matrix product
# templates contain other functions and macros.)
_KERNEL = re.compile(
    rf'\s*{re.escape(_INCLUDE)}\s*extern "C"\s+void\s+kernel(\([^{{}};#]*\)\s*{{\n(?:(?![}}#]).*\n)*}})\s*'
)
# The bindings' headers must be included outside of a namespace first.
_HEADERS = f"{_INCLUDE}\n#define PY_SSIZE_T_CLEAN\n" + "".join(
    f"#include <{header}>\n" for header in ("Python.h", "sstream", "cstdlib", "cerrno")
)

_Function = Callable[..., None]
_one_by_one = AsyncCompile.cpp_pybinding


@contextlib.contextmanager
def in_batches() -> Iterator[None]:
    """Within the block, Inductor compiles CPU kernels in batches. For one thread at a time."""
    wait = AsyncCompile.wait
    kernels: list[_Kernel] = []

    def cpp_pybinding(compiler: Any, argument_types: list[str], code: str) -> Any:
        if get_compile_threads() <= 1 or _KERNEL.fullmatch(code) is None:
            return _one_by_one(compiler, argument_types, code)
        kernels.append(_Kernel(compiler, argument_types, code))
        return LambdaFuture(kernels[-1].result)

    def wait_for_all(compiler: Any, scope: dict[str, Any]) -> None:
        for batch in _split(kernels):
            _begin(batch)
        kernels.clear()
        wait(compiler, scope)

    with mock.patch.multiple(AsyncCompile, cpp_pybinding=cpp_pybinding, wait=wait_for_all):
        yield


class _Kernel:
    """A kernel that Inductor requests, compiled alone or in a batch."""

    def __init__(self, compiler: Any, argument_types: list[str], code: str) -> None:
        self.compiler = compiler
        self.argument_types = argument_types
        self.code = code
        self.of_batch: Callable[[], _Function] | None = None

    @functools.cached_property
    def alone(self) -> Any:
        """A function that waits for the kernel, compiled in torch's own way."""
        return _one_by_one(self.compiler, self.argument_types, self.code)

    def result(self) -> _Function:
        """Wait for the compiled kernel."""
        if self.of_batch is not None:
            try:
                return self.of_batch()
            except Exception as error:
                _log.debug("a kernel is compiled separately: %s", error)
        function: _Function = self.alone.result()
        return function


def _split(kernels: Sequence[_Kernel]) -> Iterator[Sequence[_Kernel]]:
    size = _BATCH if len(kernels) >= 2 * _BATCH else 1
    return (kernels[first : first + size] for first in range(0, len(kernels), size))


def _begin(batch: Sequence[_Kernel]) -> None:
    """Start compiling a batch in another process."""
    if len(batch) == 1:
        _begin_alone(batch)
        return
    try:
        functions = _compiled(batch)
    except Exception as error:
        _log.debug("kernels are compiled one by one: %s", error)
        _begin_alone(batch)
        return
    for index, kernel in enumerate(batch):
        kernel.of_batch = functools.partial(_of_batch, functions, index, batch)


def _of_batch(functions: Callable[[], Sequence[_Function]], index: int, batch: Sequence[_Kernel]) -> _Function:
    try:
        return functions()[index]
    except Exception:
        _begin_alone(batch)
        raise


def _begin_alone(batch: Sequence[_Kernel]) -> None:
    """Start compiling each kernel of a batch in its own process, in parallel."""
    for kernel in batch:
        kernel.of_batch = None
        _ = kernel.alone


def _compiled(batch: Sequence[_Kernel]) -> Callable[[], Sequence[_Function]]:
    """Start compiling a batch; returns a function that waits for its kernels."""
    names = [f"kernel_{index}" for index in range(len(batch))]

    class Batch(CppPythonBindingsCodeCache):
        """One library that holds a module for each of its kernels."""

        cache: dict[str, Any] = {}  # noqa: RUF012, as torch has it

        @classmethod
        def _load_library_inner(cls, path: str, key: str) -> ModuleType:
            library = ModuleType(key)
            library.kernels = [_module(name, path, key) for name in names]  # type: ignore[attr-defined]
            return library

    code = _HEADERS + "\n".join(_in_namespace(*pair) for pair in zip(names, batch, strict=True))
    load = Batch.load_async(code, "cpu", submit_fn=batch[0].compiler.submit)
    return lambda: [getattr(module, name) for name, module in zip(names, load().kernels, strict=True)]


def _module(name: str, path: str, key: str) -> ModuleType:
    class Binding(CppPythonBindingsCodeCache):
        """Has torch load the module of this name from a library."""

        entry_function = name

    return Binding._load_library_inner(path, key)


def _in_namespace(name: str, kernel: _Kernel) -> str:
    """A kernel and torch's bindings for it, in a namespace of their own."""
    found = _KERNEL.fullmatch(kernel.code)
    assert found is not None
    arguments = (kind.replace("const ", "") for kind in kernel.argument_types)
    values = ", ".join(f"parse_arg<{kind}>(args, {n})" for n, kind in enumerate(arguments))
    bindings = CppPythonBindingsCodeCache.suffix_template.format(
        arg_len=len(kernel.argument_types),
        call_entry_func=f"{name}({values}); Py_RETURN_NONE;",
        entry_func=name,
        extra_parse_arg="",
    )
    return f"namespace in_{name} {{\nstatic void {name}{found[1]}\n{bindings}\n}}\n"
