"""Checks that Inductor's code for a graph in regions computes what the graph does: this feature is rarely used."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree

from ..best_effort import best_effort
from ..graph import fx_utils
from ..tensors import relative_error

# Relative, per output. Different float rounding leads to different 8-bit steps, so that results differ by about 0.01. A
# value that is computed wrongly has an error as large as itself: this detects it if it makes up a tenth of an output.
_LARGEST_DIFFERENCE = 0.1


class Reference:
    """A graph before it is compiled, to be run op by op for the same inputs.

    ``options`` are passed to Inductor. ``directory`` is that of its caches; successful checks are recorded there, so
    that a graph is compared once and not at each start.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[Any],
        options: Mapping[str, Any],
        directory: Path | None,
    ) -> None:
        self._note = None
        if directory is not None:
            self._note = directory / f"agrees-{_digest(graph_module, inputs, options)}"
        self._inputs = inputs
        self._graph = None if self._was_checked() else _copied(graph_module)

    def _was_checked(self) -> bool:
        return self._note is not None and self._note.exists()

    @torch.no_grad()
    def check(self, compiled: Callable[..., Any]) -> None:
        """Raise RuntimeError unless ``compiled`` gives the same result as the graph."""
        if self._graph is None:
            return
        expected = pytree.tree_leaves(self._graph(*self._inputs))
        # Outputs that are not floats, are all zeros, or are not finite cannot be compared.
        known = [i for i, value in enumerate(expected) if _is_float(value) and _is_known(value)]
        if not known:
            return
        results = pytree.tree_leaves(compiled(*self._inputs))
        errors = [relative_error(results[i], expected[i]) for i in known]
        worst = math.nan if any(map(math.isnan, errors)) else max(errors)
        if not worst <= _LARGEST_DIFFERENCE:
            raise RuntimeError(f"the compiled result differs by {worst:.2g} from the uncompiled one")
        if self._note is not None:
            with best_effort("cannot write %s", self._note):
                self._note.touch()


def _copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy with regions of its own: Inductor changes these as well."""
    copied = fx_utils.copy_graph(graph_module)
    for name, region in graph_module.named_children():
        if isinstance(region, fx.GraphModule):
            setattr(copied, name, fx_utils.copy_graph(region))
    return copied


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_known(value: torch.Tensor) -> bool:
    return not math.isnan(relative_error(value, value))


def _digest(graph_module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> str:
    """A digest of all that Inductor's code depends on."""
    modules = [module for _, module in sorted(graph_module.named_modules()) if isinstance(module, fx.GraphModule)]
    code = [str(module.graph) for module in modules]
    like = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x) for x in inputs]
    settings = sorted((name, repr(value)) for name, value in options.items())
    return hashlib.sha256(repr((code, like, settings, torch.get_num_threads())).encode()).hexdigest()[:32]
