"""The command ``onlinequant``: ``doctor``, ``demo``, ``stats``, ``clear``, ``export`` and ``import``."""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..cache import eviction, listing
from ..cache.atomic_files import read_where_told
from ..cache.cache_store import ENVIRONMENT_VARIABLES, Cache
from ..cache.calibration_checks import InvalidEntryError
from ..cache.calibration_file import MAX_BYTES, STATS_FILE, Calibration, decode
from ..console import accept_any_text
from ..errors import OnlineQuantError, StatsFileError
from ..operating_system import quoted
from ..report.report import Report
from . import transfer


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` is what follows the program's name, by default the process's arguments.

    Returns the exit status: 0 for success, 1 where the machine cannot do what was asked, 2 for a wrong argument.
    """
    for stream in (sys.stdout, sys.stderr):
        accept_any_text(stream)
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except OnlineQuantError as error:
        return _fail(error, 2)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onlinequant", description="A torch.compile backend that quantizes diffusion UNets, calibrated online."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("doctor", help="check whether 8-bit layers can run on this machine, and say why not")
    _add_cache_dir(command)
    command.set_defaults(command=_doctor)

    command = commands.add_parser(
        "demo", help="draw pictures with eager, torch.compile and onlinequant on this CPU, in two or three minutes"
    )
    command.add_argument(
        "--output", type=Path, default=Path("onlinequant-demo"), metavar="DIR", help="where its files go"
    )
    command.add_argument("--steps", type=_positive, default=20, metavar="N", help="steps of the sampler, by default 20")
    command.set_defaults(command=_demo)

    command = commands.add_parser(
        "stats", help="list the calibrations in the cache, or print what became of every layer"
    )
    command.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="DIR",
        help=f"print every {STATS_FILE} below this folder; also takes one such file, or an exported calibration",
    )
    _add_cache_dir(command)
    command.set_defaults(command=_stats)

    command = commands.add_parser("clear", help="remove everything in the cache, or only what is old or exceeds a size")
    command.add_argument("--older-than", type=_amount, metavar="DAYS", help="remove what was not used for so many days")
    command.add_argument(
        "--max-size", type=_amount, metavar="GB", help="remove what was used least recently, down to this size"
    )
    _add_cache_dir(command)
    command.set_defaults(command=_clear)

    command = commands.add_parser("export", help="write a calibration to a file, for another machine")
    command.add_argument("key", metavar="KEY", help="as `onlinequant stats` shows it, or the beginning of a key")
    command.add_argument("file", type=Path, metavar="FILE")
    _add_cache_dir(command)
    command.set_defaults(command=_export)

    command = commands.add_parser("import", help="read an exported calibration into the cache")
    command.add_argument("file", type=Path, metavar="FILE")
    _add_cache_dir(command)
    command.set_defaults(command=_import)
    return parser


def _add_cache_dir(command: argparse.ArgumentParser) -> None:
    default = f"{' or '.join(ENVIRONMENT_VARIABLES)}, or the user's cache directory"
    command.add_argument("--cache-dir", metavar="DIR", help=f"the cache directory; by default {default}")


def _positive(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")


def _amount(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor  # imports torch, as the demo does: seconds that the other commands need not wait

    findings = doctor.examine(arguments.cache_dir)
    print(doctor.render(findings))
    return 0 if findings.works else 1


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    _show_log()
    try:
        made = demo.run(arguments.output, steps=arguments.steps)
    except (OnlineQuantError, ModuleNotFoundError) as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(f"Cannot write into {str(arguments.output)!r}: {error}. Choose another --output.", 2)
    return 0 if made.phase == "quantized" else 1


def _stats(arguments: argparse.Namespace) -> int:
    return _list(_open(arguments)) if arguments.path is None else _print_stats(arguments.path)


def _open(arguments: argparse.Namespace) -> Cache:
    cache = Cache.open(arguments.cache_dir)
    if cache.root is None:
        raise OnlineQuantError(f"There is no cache directory: name one with --cache-dir or {ENVIRONMENT_VARIABLES[0]}.")
    return cache


def _list(cache: Cache) -> int:
    found = cache.entries()
    if not found:
        print(f"There is no calibration in {cache.root}. A run with backend='onlinequant' adds one.")
        return 0
    print(listing.render(found), end="\n\n")
    # An imported calibration has no statistics before a model has used it.
    has_statistics = any((entry.path / STATS_FILE).is_file() for entry in found)
    hint = f"; `onlinequant stats {quoted(str(cache.root))}` prints every layer." if has_statistics else "."
    print(f"{_count(len(found), 'calibration')} in {cache.root}{hint}")
    return 0


def _print_stats(path: Path) -> int:
    files = [path] if path.is_file() else sorted(path.rglob(STATS_FILE))
    if not files:
        return _fail(
            f"There is no {STATS_FILE} below {str(path)!r}. A run with backend='onlinequant' writes one once "
            "it has been observed; `onlinequant doctor` names the directory.",
            2,
        )
    status = 0
    for file in files:
        calibration = _calibration(file)
        if calibration is not None:
            print(_described(file, calibration))
            continue
        try:
            print(Report.load(file).table(), end="\n\n")
        except StatsFileError as error:
            status = _fail(error, 2)
    return status


def _calibration(file: Path) -> Calibration | None:
    """What ``onlinequant export`` wrote to a file, or a cache entry's; None for any other file."""
    try:
        return decode(read_where_told(file, MAX_BYTES))[1]
    except (OSError, InvalidEntryError):
        return None


def _described(file: Path, calibration: Calibration) -> str:
    made = "".join(f"\n  {name}: {value}" for name, value in calibration.about.items())
    return (
        f"{file} is a calibration of {len(calibration.layers)} layers of {calibration.model}, observed in "
        f"{_count(calibration.calls, 'call')}. `onlinequant import {quoted(str(file))}` takes it into the cache; "
        f"there are statistics of its layers once a model has used it.{made}"
    )


def _clear(arguments: argparse.Namespace) -> int:
    cache = _open(arguments)
    removed = cache.clear(arguments.older_than, arguments.max_size)
    counts = collections.Counter(item.kind for item in removed)
    what = ", ".join(_count(count, _DESCRIPTIONS[kind]) for kind, count in counts.items())
    size = listing.human_size(sum(item.size for item in removed))
    print(f"Removed from {cache.root}: {what or 'nothing'}" + (f"; {size} in all." if removed else "."))
    if arguments.older_than is None and arguments.max_size is None and cache.root is not None:
        kept = eviction.items(cache.root)
        if kept:
            return _fail(f"{len(kept)} could not be removed, because they are in use or may not be written.", 1)
    return 0


# What is called how, by ``eviction.Item.kind``.
_DESCRIPTIONS = {
    eviction.ENTRIES: "calibration",
    eviction.IMPORTED: "imported calibration",
    eviction.INDUCTOR: "Inductor cache",
    eviction.ASIDE: "corrupt folder",
}


def _export(arguments: argparse.Namespace) -> int:
    calibration = transfer.export_calibration(_open(arguments), arguments.key, arguments.file)
    print(f"Wrote the calibration of {len(calibration.layers)} layers of {calibration.model} to {arguments.file}.")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    cache = _open(arguments)
    key, calibration = transfer.import_calibration(cache, arguments.file)
    print(
        f"Imported the calibration of {len(calibration.layers)} layers of {calibration.model} into {cache.root}. "
        f"A model with the same layers and weights (key {key[:32]}...) will use it and observe nothing."
    )
    return 0


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _fail(message: object, status: int) -> int:
    print(f"onlinequant: {message}", file=sys.stderr)
    return status


def _show_log() -> None:
    """Send this package's log to standard error: what takes minutes should not look as if it hung."""
    log = logging.getLogger("onlinequant")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO)
