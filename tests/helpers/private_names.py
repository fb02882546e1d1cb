"""Which private names of torch a source file reads."""

from __future__ import annotations

import ast
import re

# `torch.fx.experimental` has no underscore, but promises nothing either.
_PRIVATE = re.compile(r"torch\.(.*\.)?(_(?!_)\w+|fx\.experimental\.\w+)(\..*)?")


def private_names(source: str) -> set[str]:
    """The private names of torch, in full, that ``source`` imports or reads."""
    tree = ast.parse(source)
    modules = {"torch": "torch"}  # what each local name stands for
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch."):
                    found.add(alias.name)
                    if alias.asname:
                        modules[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "torch":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name)
                modules[alias.asname or alias.name] = name
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            root, *rest = _chain(node)
            if root in modules:
                found.add(".".join([modules[root], *rest]))
    return {name for name in found if _PRIVATE.fullmatch(name)}


def _chain(node: ast.expr) -> list[str]:
    """The names of ``a.b.c``; begins with "" where it does not begin with a name."""
    if isinstance(node, ast.Attribute):
        return [*_chain(node.value), node.attr]
    return [node.id if isinstance(node, ast.Name) else ""]
