"""What a cache holds, for people: a table of its entries, and finding one by a part of its key."""

from __future__ import annotations

import dataclasses
import io
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..console import SIMPLE_HEAD
from . import eviction
from .atomic_files import read_file
from .calibration_checks import MAX_LAYERS
from .calibration_file import CALIBRATION_FILE, MAX_BYTES, STATS_FILE, decode, parse_object
from .eviction import ENTRIES, IMPORTED, WEIGHTS, Item

_WIDTH = 120
_PART = 16
_UNREADABLE = "(unreadable)"


@dataclasses.dataclass(frozen=True)
class EntryInfo:
    """One calibration of the cache.

    Attributes:
        key: 64 hex digits; 32 for an imported calibration, which serves every machine and graph.
        path: its folder.
        model: class name of the model.
        quantized: how many layers run in 8 bit; None where that is not known.
        layers: how many layers could; None where that is not known.
        size: bytes.
        last_used: seconds since 1970.
        weights: bytes of the checkpoint's 8-bit weights, which entries of one model share; 0 where none are saved.
    """

    key: str
    path: Path
    model: str
    quantized: int | None
    layers: int | None
    size: int
    last_used: float
    weights: int = 0


def entries(root: Path) -> list[EntryInfo]:
    """Entries and imported calibrations, last used first; one that cannot be read says so as its model."""
    items = eviction.items(root)
    found = [item for item in items if item.kind in (ENTRIES, IMPORTED)]
    weights = {item.path.name: item.size for item in items if item.kind == WEIGHTS}
    return [_describe(item, weights.get(item.path.name[:48], 0)) for item in reversed(found)]


def _describe(item: Item, weights: int) -> EntryInfo:
    model, quantized, layers = _UNREADABLE, None, None
    try:
        if not item.path.is_symlink():
            read = _read_imported if item.kind == IMPORTED else _read_stats
            model, quantized, layers = read(item.path)
    except (OSError, KeyError, TypeError, ValueError):
        pass  # it is listed all the same, so that it can be cleared
    return EntryInfo(item.path.name, item.path, model, quantized, layers, item.size, item.last_used, weights)


def _read_stats(folder: Path) -> tuple[str, int | None, int | None]:
    stats = parse_object(read_file(folder / STATS_FILE, MAX_BYTES), STATS_FILE)
    counts = stats["counts"]
    quantized, layers = (
        sum(_count(counts[f"{what}_{kind}"]) for kind in ("conv", "linear"))
        + _count(counts.get(f"{what}_attention", 0))  # older files have none
        for what in ("quantized", "candidates")
    )
    model = stats["model"]
    if not (isinstance(model, str) and model.isprintable()):  # it would reach a terminal
        raise ValueError("the model's name cannot be printed")
    return model, quantized, layers


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_LAYERS:
        raise ValueError("a number of layers is none")
    return value


def _read_imported(folder: Path) -> tuple[str, int | None, int | None]:
    _, calibration = decode(read_file(folder / CALIBRATION_FILE, MAX_BYTES))
    return calibration.model, None, len(calibration.layers)


def render(found: Sequence[EntryInfo]) -> str:
    """A table of entries, at most 120 columns wide."""
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None, markup=False, highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("in 8 bit", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    have_weights = any(entry.weights for entry in found)
    if have_weights:
        table.add_column("8-bit weights", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    names = abbreviations([entry.key for entry in found])
    for entry in found:
        weights = [human_size(entry.weights) if entry.weights else "none"] if have_weights else []
        used = _ago(time.time() - entry.last_used)
        table.add_row(names[entry.key], entry.model, _layers(entry), human_size(entry.size), *weights, used)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _layers(entry: EntryInfo) -> str:
    if entry.layers is None:
        return "?"
    return f"imported, {entry.layers} layers" if entry.quantized is None else f"{entry.quantized} of {entry.layers}"


def abbreviations(keys: Sequence[str]) -> dict[str, str]:
    """For each key the first digits of each of its parts, such as "3fa9-1b2c-77de-90aa", as many as tell all apart.

    A plain prefix would be long: graphs of one model share the first 48 digits.
    """
    for length in range(4, _PART + 1):
        short = {key: "-".join(part[:length] for part in _parts(key)) for key in keys}
        if len(set(short.values())) == len(short):
            return short
    return {key: key for key in keys}


def matcher(wanted: str) -> Callable[[str], bool]:
    """Whether a key begins with ``wanted``, or each of its parts with that of an abbreviation."""
    parts = wanted.lower().split("-")
    if len(parts) == 1:
        return lambda key: key.startswith(parts[0])
    return lambda key: len(parts) <= len(_parts(key)) and all(map(str.startswith, _parts(key), parts))


def _parts(key: str) -> list[str]:
    return re.findall(f".{{1,{_PART}}}", key)


def human_size(size: int) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit, length in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size} B"


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
