"""Compiles all kernels with several versions of Triton, for GPUs that need not be there, and prints a table.

    python tests/compatibility/triton_versions.py --tests 3.6.0 3.7.1 3.8.0 3.9.0

Installs each version into a folder of its own (0.7 to 1 GB, deleted afterwards) and leaves the environment alone.
``--tests`` runs the tests of the kernels in Triton's interpreter, too. ``--fusion`` compares the code with that of
other settings of floating-point fusion, which takes twice as long. Exits with 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
CAPABILITIES = ("8.0", "8.9", "9.0", "10.0", "12.0")
Found = dict[str, dict[str, dict[str, Any]]]  # of one Triton: outcomes by compute capability and family


def examine(version: str, args: argparse.Namespace) -> tuple[Found, str]:
    """What ``compile_kernels.py`` finds with this Triton, and what became of the tests."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "packages"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*install, f"triton=={version}"], check=True)
        environment = os.environ | {"PYTHONPATH": f"{target}:{ROOT}", "TRITON_CACHE_DIR": f"{scratch}/cache"}
        script = str(ROOT / "tests/kernels/nvidia/compile_kernels.py")
        options = ["--fusion"] if args.fusion else []
        command = [sys.executable, script, *options, *args.capability]
        # Triton 3.9 reports leaks of its own when it ends.
        with Path(scratch, "errors").open("w+") as errors:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
            if done.returncode:
                raise SystemExit(f"Triton {version}:\n{errors.seek(0) or errors.read()}")
        answer = json.loads(done.stdout)
        assert answer["triton"] == version
        return answer["found"], interpreted(environment) if args.tests else "not run"


def interpreted(environment: dict[str, str]) -> str:
    """The last line of the kernels' tests, which Triton's interpreter runs."""
    environment = environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "tests/kernels/nvidia", "-q", "-m", "not slow"]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return re.sub(r" in [\d.]+s.*", "", done.stdout.strip().splitlines()[-1].strip("= "))


def cell(found: Found, family: str) -> str:
    """For which GPUs a family compiled, and what failed."""
    outcomes = {capability: families[family] for capability, families in found.items()}
    on = [capability for capability, outcome in outcomes.items() if outcome["compiled"] and not outcome["failed"]]
    failed = [capability for capability, outcome in outcomes.items() if outcome["failed"]]
    parts = [", ".join(on)] if on else []
    parts += [f"**fails on {', '.join(failed)}**"] if failed else []
    is_off = all(outcome["off"] for outcome in outcomes.values())
    return "; ".join(parts) or ("off" if is_off else "nothing to compile")


def table(all_found: dict[str, Found], tests: dict[str, str]) -> Iterator[str]:
    """Lines of Markdown: a row for each family, a column for each version."""
    versions = list(all_found)
    first = next(iter(all_found[versions[0]].values()))
    yield f"| kernels | {' | '.join(f'Triton {version}' for version in versions)} |"
    yield f"| --- | {' | '.join('---' for _ in versions)} |"
    for family in first:
        yield f"| {family} | {' | '.join(cell(all_found[version], family) for version in versions)} |"
    yield f"| tests in the interpreter | {' | '.join(tests[version] for version in versions)} |"


def notes(all_found: dict[str, Found]) -> Iterator[str]:
    """Why families are off, what failed, and what depends on fusion: a line for each, with where that is so."""
    where: dict[str, set[tuple[str, str]]] = {}
    for version, found in all_found.items():
        for capability, families in found.items():
            for family, outcome in families.items():
                texts = [f"off: {outcome['off']}"] if outcome["off"] else []
                texts += [f"{call} fails: {error.splitlines()[0]}" for call, error in outcome["failed"].items()]
                texts += [f"{kernel} depends on Triton's default of fusion" for kernel in outcome["by_default"]]
                texts += [f"{kernel} is other code with the opposite fusion" for kernel in outcome["by_opposite"]]
                for text in texts:
                    where.setdefault(f"{family} {text}", set()).add((version, capability))
    for text, places in where.items():
        versions = [version for version in all_found if any(place[0] == version for place in places)]
        capabilities = sorted({capability for _, capability in places}, key=float)
        yield f"- {text} (compute capability {', '.join(capabilities)}; Triton {', '.join(versions)})"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--capability", nargs="+", default=CAPABILITIES)
    parser.add_argument("--fusion", action="store_true")
    parser.add_argument("--tests", action="store_true")
    args = parser.parse_args()
    answers = {version: examine(version, args) for version in args.versions}
    all_found = {version: found for version, (found, _) in answers.items()}
    tests = {version: text for version, (_, text) in answers.items()}
    sys.stdout.write("\n".join([*table(all_found, tests), "", *notes(all_found), ""]))
    outcomes = [o for found in all_found.values() for families in found.values() for o in families.values()]
    return int(
        any(o["failed"] for o in outcomes) or any("failed" in text or "error" in text for text in tests.values())
    )


if __name__ == "__main__":
    sys.exit(main())
