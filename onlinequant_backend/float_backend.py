"""The backend for a torch without the private parts that quantization needs: every model stays in float."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from .best_effort import warn_once
from .report import report
from .report.phases import Phase
from .torch_internals import parts


def onlinequant(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **ignored: Any,
) -> Callable[..., Any]:
    """As ``quantizing_backend.onlinequant``, in float. Options are not checked."""
    reason = parts.why_float() or "this torch is not supported"
    options = {**(options or {})}
    entry = report.Report(model="graph", precision_reason=reason, config=options)
    report.register(entry)
    entry.enter(Phase.FLOAT, reason)
    warn_once(reason, "Every model stays in float: %s", reason)
    if options.get("compile_in_background"):  # the caller does not wait for compiling
        return graph_module
    try:
        compile_fx: Callable[..., Callable[..., Any]] = torch._dynamo.lookup_backend("inductor")
    except Exception as error:
        warn_once("no Inductor", "Models run uncompiled, since Inductor was not found: %s", error)
        return graph_module
    return compile_fx(graph_module, list(example_inputs))


@contextlib.contextmanager
def failures_raised() -> Iterator[None]:
    """As in ``quantizing_backend``; nothing fails here."""
    yield


def invalidate(module: torch.nn.Module) -> int:
    """As ``runtime.control.invalidate``."""
    return 0


def place(module: torch.nn.Module, device: torch.device | str = "cuda") -> torch.nn.Module:
    """``module.to(device)``: without 8-bit copies, weights are needed where the model runs."""
    return module.to(device)


def release(module: torch.nn.Module) -> int:
    """As ``runtime.control.release``."""
    return 0


def copied_bytes(module: torch.nn.Module) -> int:
    """As ``runtime.control.copied_bytes``."""
    return 0


def host_bytes(module: torch.nn.Module) -> int:
    """As ``runtime.control.host_bytes``."""
    return 0


def reset() -> None:
    """As ``runtime.control.reset``."""
    report.clear()
