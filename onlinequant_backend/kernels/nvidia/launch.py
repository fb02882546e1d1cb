"""How Triton's kernels are called: launched, or only compiled within ``precompile.on``."""

from __future__ import annotations

import dis
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

from . import precompile
from .gpu import gpu_of

# By kernel, whether a product and a sum may become one instruction, which rounds once instead of twice. The default of
# Triton is yes up to 3.9 and no from 3.10 on; without a word here, results would change with the version.
FUSES_PRODUCTS_AND_SUMS = {
    # Sums of 8-bit products are exact or the tensor cores' affair. Scaling them and adding the bias is one instruction
    # less for each value, and one rounding less.
    "_matmul_kernel": True,
    "_geglu_kernel": True,
    "_conv_kernel": True,
    "_gluon_conv_kernel": True,
    "_gather_kernel": True,
    "_add_up_kernel": True,
    # Sums of squares, and the variance as a difference, lose less to rounding; y * factor + summand is one instruction.
    "_layer_norm_kernel": True,
    "_group_kernel": True,
    "_sum_kernel": True,
    "_combine_kernel": True,
    "_apply_kernel": True,
    # Exponents are a product minus the largest, sums shrink when one is added: one instruction for each value.
    "_attention_kernel": True,
    "_short_attention_kernel": True,
    # A mean is a sum of products.
    "_prepare_kernel": True,
    # They compare numbers as they are: there is nothing to fuse.
    "_check_kernel": False,
    "_compare_kernel": False,
}


def launch(kernel: Any, *grid: int) -> Callable[..., Any]:
    """What to call with the arguments of ``kernel``, for a program at each place of ``grid``.

    Ahead, it compiles the kernel for such arguments. Of tensors their dtypes and the alignment of their addresses
    count, so that they may be on the meta device, without any memory.
    """
    _make_keys(kernel)
    call = functools.partial(_compile, kernel, grid) if precompile.is_ahead() else kernel[grid]
    return functools.partial(call, enable_fp_fusion=FUSES_PRODUCTS_AND_SUMS[kernel.fn.__name__])


_keyed: set[int] = set()  # kernels that have keys; not the kernels, since they are hashed by their keys
_keys_lock = threading.Lock()


def _make_keys(kernel: Any) -> None:
    """Have Triton make the keys of all that ``kernel`` calls, and at last its own.

    Triton 3.6 leaves the constants of a called function out of a key if that one has none yet, so that another process
    would not find a kernel in the cache if it asked in another order.
    """
    if id(kernel) not in _keyed:
        with _keys_lock:
            for function in _calls_first(kernel, set()):
                _ = function.cache_key
        _keyed.add(id(kernel))


def _calls_first(function: Any, seen: set[int]) -> Iterator[Any]:
    """Triton's functions that ``function`` calls, directly or not, each after those that it calls itself."""
    if id(function) in seen or not isinstance(function, triton.JITFunction):
        return
    seen.add(id(function))
    for instruction in dis.get_instructions(function.fn):
        if instruction.opname == "LOAD_GLOBAL":
            yield from _calls_first(function.fn.__globals__.get(instruction.argval), seen)
    yield function


def _compile(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    compiled = kernel.warmup(*args, grid=grid, **options)
    if compiled is not None:  # by the interpreter nothing is
        # Triton 3.6 compiles this one, too, in C; it is found in the cache when the kernel is loaded.
        triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


def processors(device: torch.device) -> int:
    """The multiprocessors of a GPU, see ``gpu_of``; 1 for a CPU, on which the interpreter runs."""
    return 1 if device.type == "cpu" else gpu_of(device).processors
