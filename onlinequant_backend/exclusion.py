"""Which layers the option ``exclude`` matches."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator

# The names that PEFT gives to the parts of a layer with which it replaces a model's own.
_ADAPTER = re.compile(r"\.(base_layer|original_module|modules_to_save|lora_\w+)(?=\.|$)")
_ADAPTED_MODEL = "base_model.model."


def matching(name: str, patterns: Iterable[str]) -> str | None:
    """The first of the glob patterns that matches the layer of this name."""
    known = list(_known_as(name))
    return next((pattern for pattern in patterns if any(fnmatch.fnmatchcase(one, pattern) for one in known)), None)


def unmatched(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """The glob patterns that match no layer."""
    return [pattern for pattern in patterns if not any(matching(name, [pattern]) for name in names)]


def _known_as(name: str) -> Iterator[str]:
    """A layer's name and, if it is part of an adapter, the name of the layer that this replaced: a pattern that was
    written for a model still matches after an adapter was loaded into it."""
    for one in (name, name.removeprefix(_ADAPTED_MODEL)):
        yield one
        yield from (one[: adapter.start()] for adapter in _ADAPTER.finditer(one))
