"""A digest of the source files that a cached result depends on."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.lru_cache(maxsize=1)
def source_digest() -> str:
    """A hex digest of this package's sources: a changed pass or kernel makes a different result."""
    from .. import passes

    digest = hashlib.sha256()
    for folder in (Path(__file__).parents[1], Path(passes.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
