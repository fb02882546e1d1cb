"""Where files go between runs: which directory, which entry, and writing without half-written files.

Nothing here may break a run: whoever calls these functions catches OSError and goes on without the cache.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

import platformdirs

# The first is ours; the second is the predecessor's, so that its users' set-ups go on working.
ENVIRONMENT_VARIABLES = ("ONLINEQUANT_CACHE_DIR", "COMFYUI_ONEDIFF_SAVE_GRAPH_DIR")


def cache_directory(configured: str | None) -> Path:
    """The root of the cache: the option ``cache_dir``, else the environment, else the user's cache directory.

    The directory need not exist: ``write_atomically`` makes it.
    """
    for value in (configured, *map(os.environ.get, ENVIRONMENT_VARIABLES)):
        if value:
            return Path(value).expanduser()
    return platformdirs.user_cache_path("onlinequant")


def entry_directory(root: Path, key: str) -> Path:
    """The directory of the entry ``key`` (a lower-case hex digest); raises ValueError for any other string."""
    if not re.fullmatch("[0-9a-f]+", key):
        raise ValueError(f"a cache key is a lower-case hex digest, not {key!r}")
    return root / key


def directory_size(path: Path) -> int:
    """Bytes in all files below ``path``; 0 where there is no such directory. Links are not followed."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += Path(folder, name).lstat().st_size
            except FileNotFoundError:  # another process took it away meanwhile
                continue
    return total


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path``, making its folder: a reader sees the old file or the new one, never half.

    Raises OSError where that cannot be done, and then leaves no temporary file behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because replacing is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
