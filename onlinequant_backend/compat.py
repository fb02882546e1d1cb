"""Everything that differs between the torch versions we support (2.11 to 2.13), in one place."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import ShortenTraceback


class UnwrappedError(ShortenTraceback):
    """An error that Dynamo passes on to the user as it is, instead of as ``BackendCompilerFailed``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, first_useful_frame=None)


def hint(size: int | torch.SymInt) -> int:
    """The concrete size that Dynamo saw for a possibly symbolic ``size``."""
    if isinstance(size, int):
        return size
    node = size.node
    if getattr(node, "hint", None) is not None:
        return int(node.hint)
    return int(node.shape_env.size_hint(node.expr))


def compiled_module_name() -> str:
    """Class of the module that Dynamo is compiling right now; "graph" where it is not a module.

    The graph does not tell: its nodes know the modules below the root only. Dynamo's own frames hold the root.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        compiled = getattr(frame.f_locals.get("frame"), "f_locals", {})
        if isinstance(compiled.get("self"), torch.nn.Module):
            return type(compiled["self"]).__name__
        frame = frame.f_back
    return "graph"


def cpu_flags() -> dict[str, bool]:
    """The 8-bit matrix instructions of this CPU: ``avx512_vnni``, ``avx_vnni``, ``amx_int8`` and ``avx2``."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "avx512_vnni": bool(torch.cpu._is_vnni_supported()),
        "avx_vnni": bool(capabilities.get("avx_vnni", False)),
        "amx_int8": bool(torch.cpu._is_amx_tile_supported()),
        "avx2": bool(torch.cpu._is_avx2_supported()),
    }


def int8_instructions() -> str | None:
    """The best of this CPU's instructions that sum 8-bit products in 32 bits; None if it has none."""
    flags = cpu_flags()
    return next((flag for flag in ("amx_int8", "avx512_vnni", "avx_vnni") if flags[flag]), None)


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The Inductor options that ``torch.compile(mode=...)`` stands for; raises RuntimeError for an unknown mode."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def inductor_option_names() -> frozenset[str]:
    """Every option name that Inductor accepts, with underscores."""
    from torch._inductor import config

    return frozenset(name.replace("-", "_") for name in config.get_config_copy())


def compile_fx(
    graph_module: torch.fx.GraphModule,
    inputs: list[Any],
    options: dict[str, Any],
    *,
    outside_dynamo: bool,
) -> Callable[..., Any]:
    """Compile with Inductor; ``outside_dynamo`` says that no Dynamo tracing context owns the graph any more."""
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    extra: dict[str, Any] = {"ignore_shape_env": True} if outside_dynamo else {}
    compiled: Any = inductor_compile_fx(graph_module, inputs, config_patches=dict(options) or None, **extra)
    return compiled
