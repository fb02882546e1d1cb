"""Which layers the option ``exclude`` means."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator

# What PEFT names the parts of a layer that it puts in the place of a model's own.
_ADAPTER = re.compile(r"\.(base_layer|original_module|modules_to_save|lora_\w+)(?=\.|$)")
_ADAPTED_MODEL = "base_model.model."


def matching(name: str, patterns: Iterable[str]) -> str | None:
    """The first of the glob patterns that means the layer of this name."""
    known = list(_known_as(name))
    return next((pattern for pattern in patterns if any(fnmatch.fnmatchcase(one, pattern) for one in known)), None)


def unmatched(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """The glob patterns that mean none of the layers."""
    return [pattern for pattern in patterns if not any(matching(name, [pattern]) for name in names)]


def _known_as(name: str) -> Iterator[str]:
    """A layer's name and, where it is a part of an adapter, that of the layer in whose place this is: a pattern that
    was written for a model holds after an adapter was loaded into it."""
    for one in (name, name.removeprefix(_ADAPTED_MODEL)):
        yield one
        yield from (one[: adapter.start()] for adapter in _ADAPTER.finditer(one))
