"""Whether Inductor's code for a graph in regions does what the graph does: few others ask Inductor for such graphs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from .sensitivity import relative_error
from .trouble import going_on

# Relative. Other roundings of floats fall into other steps of 8 bit, so that a step differs by 0.01 or so; what is
# computed wrongly is off by as much as it is large.
_LARGEST_DIFFERENCE = 0.1


@torch.no_grad()
def check(
    compiled: Callable[..., Any], op_by_op: fx.GraphModule, inputs: Sequence[Any], directory: Path | None
) -> None:
    """Raise RuntimeError unless ``compiled`` gives what ``op_by_op`` gives for ``inputs``.

    ``directory``: of Inductor's caches, where it is noted what was found right, so that it is compared once and not at
    each start.
    """
    note = None if directory is None else directory / f"agrees-{_digest(op_by_op, inputs)}"
    if note is not None and note.exists():
        return
    expected = op_by_op(*inputs)
    if math.isnan(relative_error(expected, expected)):  # nothing but zeros, or some that are not finite
        return
    error = relative_error(compiled(*inputs), expected)
    if not error <= _LARGEST_DIFFERENCE:
        raise RuntimeError(f"compiled, they differ by {error:.2g} from the same operations one by one")
    if note is not None:
        with going_on("cannot write %s", note):
            note.touch()


def _digest(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Of the graph, its subgraphs, and what its inputs are like."""
    modules = [module for _, module in sorted(graph_module.named_modules()) if isinstance(module, fx.GraphModule)]
    code = [str(module.graph) for module in modules]
    like = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x) for x in inputs]
    return hashlib.sha256(repr((code, like)).encode()).hexdigest()[:32]
