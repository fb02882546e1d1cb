"""A digest of the source files that a cached result depends on."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

# The modules, each with all below it, that can change what is observed, selected or compiled. A change of any other one
# must not make every user calibrate and compile anew.
COUNTED = (
    "analysis",
    "backend",
    "cache.calibration_checks",
    "cache.calibration_file",
    "compilation",
    "config",
    "exclusion",
    "graph",
    "kernels",
    "ops",
    "passes",
    "quantization",
    "quantizing_backend",
    "runtime",
    "selection",
    "tensors",
    "torch_internals",
)


@functools.lru_cache(maxsize=1)
def source_digest() -> str:
    """A hex digest of the counted sources."""
    return digest(sources())


def digest(files: Mapping[str, Path]) -> str:
    """A hex digest of the names and contents of files."""
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        total.update(f"{name}\n".encode() + path.read_bytes())
    return total.hexdigest()


def sources() -> dict[str, Path]:
    """The counted source files, by a name that is the same in a checkout and in a wheel. Imports none of them."""
    package = __name__.partition(".")[0]
    files: dict[str, Path] = {}
    for module in COUNTED:
        spec = importlib.util.find_spec(f"{package}.{module}")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} lacks its module {module}")
        folders = map(Path, spec.submodule_search_locations or ())
        found = [path for folder in folders for path in folder.rglob("*.py")] or [Path(spec.origin)]
        files |= {f"{module}/{path.relative_to(Path(spec.origin).parent).as_posix()}": path for path in found}
    return files
