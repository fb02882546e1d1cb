"""Carrying a calibration to another machine, as one file. Compiled code stays where it was compiled."""

from __future__ import annotations

from pathlib import Path

from ..cache import listing
from ..cache.atomic_files import publish_folder, read_file, read_where_told, write_where_told
from ..cache.cache_store import Cache
from ..cache.calibration_checks import InvalidEntryError
from ..cache.calibration_file import CALIBRATION_FILE, MAX_BYTES, Calibration, decode
from ..cache.eviction import IMPORTED
from ..cache.listing import EntryInfo
from ..errors import CalibrationFileError


def export_calibration(cache: Cache, wanted: str, path: Path) -> Calibration:
    """Write the calibration that ``wanted`` names, a unique prefix of a key or an abbreviation, to the file ``path``.

    Raises CalibrationFileError where there is not exactly one, or it cannot be read or written.
    """
    entry = _find(cache, wanted)
    try:
        data = read_file(entry.path / CALIBRATION_FILE, MAX_BYTES)
        calibration = Calibration.from_bytes(data, entry.key)
    except (OSError, InvalidEntryError) as error:
        raise CalibrationFileError(
            f"The entry {entry.key} cannot be read: {error}. Run the model again, which replaces it."
        ) from error
    try:
        write_where_told(path, data)
    except OSError as error:
        raise CalibrationFileError(f"Cannot write {str(path)!r}: {error}. Choose another file.") from error
    return calibration


def import_calibration(cache: Cache, path: Path) -> tuple[str, Calibration]:
    """Take in a file that ``export_calibration`` wrote; returns its key and what it holds.

    Raises CalibrationFileError for any other file, and where the cache cannot be written.
    """
    try:
        key, calibration = decode(read_where_told(path, MAX_BYTES))
    except OSError as error:
        raise CalibrationFileError(f"Cannot read {str(path)!r}: {error}.") from error
    except InvalidEntryError as error:
        raise CalibrationFileError(
            f"{str(path)!r} is refused: {error}. Export it anew, with `onlinequant export` of this version."
        ) from error
    try:
        if cache.root is None:
            raise FileNotFoundError("there is no cache directory")
        publish_folder(cache.root, IMPORTED, key[:32], {CALIBRATION_FILE: calibration.to_bytes(key)})
    except OSError as error:
        raise CalibrationFileError(f"Cannot write to the cache: {error}.") from error
    return key, calibration


def _find(cache: Cache, wanted: str) -> EntryInfo:
    """The entry that ``wanted`` names; the newest of those that could all use the file, whatever machine or graph."""
    known = cache.entries()
    matches = listing.matcher(wanted)
    found: dict[str, EntryInfo] = {}
    for entry in known:  # last used first
        if wanted and matches(entry.key):
            found.setdefault(entry.key[:32], entry)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        names = listing.abbreviations([entry.key for entry in known])
        raise CalibrationFileError(
            f"{wanted!r} names {len(found)} calibrations: {', '.join(names[entry.key] for entry in found.values())}. "
            "Give more digits."
        )
    raise CalibrationFileError(
        f"No key in {str(cache.root)!r} begins with {wanted!r}. `onlinequant stats` lists those there are; a run with "
        "backend='onlinequant' adds one."
    )
