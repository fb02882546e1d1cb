"""Fully qualified names of a graph's parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx

from .fx_utils import is_parameter, placeholders

# Parts of a parameter's source that are Python plumbing, not part of its name in a state dict.
_PLUMBING = frozenset({"_modules", "_parameters", "_buffers", "__dict__", "_orig_mod", "__self__"})
# The key in a node's ``meta`` that ``name_parameters`` sets.
_NAME = "qualified_name"


def name_parameters(graph_module: fx.GraphModule, arguments: Sequence[Any], root: torch.nn.Module | None) -> None:
    """Give the graph's parameters the names that they have in ``root``.

    Others are named after their source in the traced function, which does not begin at the model's root after a graph
    break or within a hook of a layer's ``forward``.
    """
    names = {} if root is None else {id(parameter): name for name, parameter in root.named_parameters()}
    for node, argument in zip(placeholders(graph_module), arguments, strict=True):
        if is_parameter(node) and id(argument) in names:
            node.meta[_NAME] = names[id(argument)]


def parameter_names(graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """The unique names of all parameter inputs. For one model they are those of ``model.named_parameters()``, as far as
    ``name_parameters`` finds them. If a function calls several models, each name begins with that of its model in the
    function.
    """
    nodes = [node for node in placeholders(graph_module) if is_parameter(node)]
    sources = {node: list(_sources(node)) for node in nodes}
    roots = {node: _called(sources[node]) for node in nodes}
    are_several = len(set(roots.values())) > 1
    names: dict[fx.Node, str] = {}
    known: Counter[str] = Counter()
    for node in nodes:
        parts = [part for part in map(_part, sources[node]) if part is not None]
        if parts and are_several and roots[node] not in ("", "self"):
            parts.insert(0, roots[node])
        name = node.meta.get(_NAME) or ".".join(parts) or node.name
        known[name] += 1
        names[node] = name if known[name] == 1 else f"{name}#{known[name]}"
    return names


def _sources(node: fx.Node) -> Iterator[Any]:
    """The chain of Dynamo's sources of an input, from the function's variable to the last attribute or item."""
    chain = []
    source = getattr(node, "_dynamo_source", None)
    while source is not None:
        chain.append(source)
        source = getattr(source, "base", None)
    return reversed(chain)


def _called(sources: Sequence[Any]) -> str:
    """The traced function's name for the object at the beginning of ``sources``; "" if it has none."""
    first = sources[0] if sources else None
    return str(getattr(first, "local_name", None) or getattr(first, "global_name", None) or "")


def _part(source: Any) -> str | None:
    """The part of a parameter's name that one source adds."""
    part = getattr(source, "member", None)
    if part is None:
        part = getattr(source, "index", None)
    return str(part) if isinstance(part, (str, int)) and part not in _PLUMBING else None
