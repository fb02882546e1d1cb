"""See the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import __doc__ as description
from .environments import ROOT, Environment
from .results import record

_UNIT = ["--ignore=tests/scenarios", "--numprocesses=auto"]
_EPILOG = "Arguments after -- are for pytest. By default all unit tests run."


def main() -> int:
    """The number of releases with which a test failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility", description=description, epilog=_EPILOG)
    parser.add_argument("torch", nargs="+", help="releases of torch, as 2.15.0")
    parser.add_argument("--python", default=sys.executable, help="the Python of the environments")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "compatibility", help="for the environments")
    parser.add_argument("--record", action="store_true", help="write the counts into docs/compatibility.md")
    parser.add_argument("--called", default="unit", help="what the table calls these tests")
    parser.add_argument("--install-only", action="store_true", help="make the environments and run no test")
    own, of_pytest = _split_at_dashes(sys.argv[1:])
    arguments = parser.parse_args(own)
    broken = 0
    for torch in arguments.torch:
        environment = Environment(arguments.folder / f"torch-{torch}", torch, arguments.python)
        if arguments.install_only:
            continue
        result, failed = environment.test(of_pytest or _UNIT, arguments.called)
        print(result, *(f"  failed: {name}" for name in failed), sep="\n", flush=True)
        broken += bool(failed)
        if arguments.record:
            record(result)
    return broken


def _split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


sys.exit(main())
