"""Access to Inductor's private functions."""

from __future__ import annotations

import contextlib
import copyreg
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast, get_origin

import torch

from . import kernel_tuning, parts, triton_digest
from .torch_settings import autocast_dtypes, settings


class _Torch:
    """Pickles as the package ``torch``; modules themselves cannot be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("torch",)


def _named_in_torch(memory_format: torch.memory_format) -> tuple[Any, ...]:
    return getattr, (_Torch(), str(memory_format).removeprefix("torch."))


# Otherwise pickle finds it in whichever module was imported first: then the keys of Inductor's caches differ between
# programs, and a pickled graph names a module of this program.
copyreg.pickle(torch.memory_format, _named_in_torch)


@contextlib.contextmanager
def free_sizes(are_ones_free: bool = True) -> Iterator[None]:
    """Symbolic sizes that happen to be equal, or 1 if ``are_ones_free``, are not specialized."""
    from torch.fx.experimental import _config

    patch: Any = _config.patch  # type: ignore[attr-defined]
    with patch(use_duck_shape=False, backed_size_oblivious=are_ones_free):
        yield


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The Inductor options of ``torch.compile(mode=...)``; raises RuntimeError for an unknown mode."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def inductor_option_types() -> dict[str, type | None]:
    """The type of each of Inductor's options, by its name with underscores; None if torch does not check it."""
    from torch._inductor import config

    types: dict[str, type | None] = {}
    for name in config.get_config_copy():
        kind: Any = config.get_type(name)  # type: ignore[attr-defined]
        types[name.replace("-", "_")] = kind if isinstance(kind, type) and get_origin(kind) is None else None
    return types


def found_graphs() -> tuple[int, int]:
    """The number of hits and misses of Inductor's graph cache in this process."""
    counts = torch._dynamo.utils.counters["inductor"]
    return counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"] + counts["fxgraph_cache_bypass"]


def forget_loaded_code() -> None:
    """Have Inductor load compiled code from its caches on disk again. Functions in use are not affected."""
    from torch._inductor.utils import clear_caches

    clear_caches()


@contextlib.contextmanager
def inductor_cache(directory: Path | None, tag: str) -> Iterator[None]:
    """Have Inductor keep its caches in ``directory``, and include ``tag`` in its cache keys. With None, or if the
    environment sets a directory, the caches stay where they are.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Inductor also writes its default directory into the environment.
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        is_users = chosen is not None and Path(chosen) != Path(default_cache_dir()).absolute()
    except (KeyError, OSError):  # torch 2.11 needs a user name for it, and there is none
        is_users = True
    _keep_kernel_cache()
    with _tagged(tag), contextlib.ExitStack() as stack:
        if directory is not None and not is_users:
            stack.enter_context(_environment("TORCHINDUCTOR_CACHE_DIR", str(directory)))
            stack.enter_context(_instructions_remembered(directory))
            kernel_tuning.remember_times(directory)
        yield


def _instructions_remembered(directory: Path) -> contextlib.AbstractContextManager[Any]:
    if parts.lacks(parts.INSTRUCTION_CHECK):
        return contextlib.nullcontext()
    from .cached_isa_check import asked_once

    return asked_once(directory)


def _tagged(tag: str) -> contextlib.AbstractContextManager[None]:
    """Cache keys include ``tag``, and AOTAutograd's cache, which saves tracing a graph twice more, accepts more graphs
    than by default: also those with calls from ``torch.nn.attention.sdpa_kernel``, which ComfyUI uses around every
    attention on a GPU. Their effect depends on their arguments and on ``_SWITCHES``, both in the key.
    ``torch.compiler.config.cache_key_tag`` cannot be used: Inductor's worker processes, which decide where the fastest
    configuration of a kernel is saved, do not receive it, so that none was found and each process autotuned again.
    """
    import torch._inductor.config as inductor_config

    names = ("_sdpa_kernel", "_sdpa_kernel_variadic", "_cur_sdpa_kernel_backends", "_backend_from_string")
    digest = f"{tag} {settings()[1]} {autocast_dtypes()}"
    known: dict[str, str] = inductor_config.unsafe_marked_cacheable_functions
    safe = {**known, **{f"torch.nn.attention.{name}": digest for name in names}}
    patched: Any = inductor_config.patch(unsafe_marked_cacheable_functions=safe)
    return cast("contextlib.AbstractContextManager[None]", patched)


def _keep_kernel_cache() -> None:
    """Keep Triton's cache in its place: with its first kernel, Inductor would move it to another folder, which lacks
    this package's compiled kernels."""
    try:
        from triton import knobs
    except ImportError:
        return
    os.environ.setdefault("TRITON_CACHE_DIR", str(knobs.cache.dir))


def _kernels_in_batches() -> contextlib.AbstractContextManager[None]:
    if parts.lacks(parts.KERNEL_BATCHES):
        return contextlib.nullcontext()
    from .batched_cpp import in_batches

    return in_batches()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def compile_fx(
    graph_module: torch.fx.GraphModule,
    inputs: list[Any],
    options: dict[str, Any],
    *,
    outside_dynamo: bool,
) -> Callable[..., Any]:
    """Compile with Inductor; ``outside_dynamo``: no Dynamo tracing context owns the graph any more."""
    triton_digest.wait()
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    extra: dict[str, Any] = {"ignore_shape_env": True} if outside_dynamo else {}
    with _kernels_in_batches() if outside_dynamo else contextlib.nullcontext():
        compiled: Any = inductor_compile_fx(graph_module, inputs, config_patches=dict(options) or None, **extra)
    return compiled
