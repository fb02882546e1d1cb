"""The command ``onlinequant``: ``doctor``, ``demo`` and ``stats``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import doctor
from .errors import OnlineQuantError, StatsFileError
from .report import STATS_FILE, Report


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` is what follows the program's name, by default the process's arguments.

    Returns the exit status: 0 for success, 1 where the machine cannot do what was asked, 2 for a wrong argument.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onlinequant", description="A torch.compile backend that runs diffusion UNets in 8 bit, calibrated online."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("doctor", help="say whether this machine can run in 8 bit, and why")
    command.set_defaults(command=_doctor)

    command = commands.add_parser(
        "demo", help="race eager, torch.compile and onlinequant on this CPU, in three minutes"
    )
    command.add_argument("--output", type=Path, default=Path("onlinequant-demo"), metavar="DIR", help="for its files")
    command.add_argument("--steps", type=_positive, default=5, metavar="N", help="timed steps, default 5")
    command.set_defaults(command=_demo)

    command = commands.add_parser("stats", help=f"print every {STATS_FILE} below a directory")
    command.add_argument("path", type=Path, metavar="DIR", help="a directory, or one such file")
    command.set_defaults(command=_stats)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _doctor(arguments: argparse.Namespace) -> int:
    findings = doctor.examine()
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
    path: Path = arguments.path
    files = [path] if path.is_file() else sorted(path.rglob(STATS_FILE))
    if not files:
        return _fail(
            f"There is no {STATS_FILE} below {str(path)!r}. A run with backend='onlinequant' writes one once "
            "it has been observed; `onlinequant doctor` names the directory.",
            2,
        )
    status = 0
    for file in files:
        try:
            print(Report.load(file).table(), end="\n\n")
        except StatsFileError as error:
            status = _fail(error, 2)
    return status


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


if __name__ == "__main__":
    sys.exit(main())
