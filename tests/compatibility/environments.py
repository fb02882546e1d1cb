"""A virtual environment with a given release of torch, and the tests that run in it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from .results import Result
from .stub_libraries import make_stubs

ROOT = Path(__file__).resolve().parents[2]
_NVIDIA = re.compile(r"Requires-Dist: (nvidia|cuda)-.*\n")


class Environment:
    """A virtual environment in ``folder``, made if there is none."""

    def __init__(self, folder: Path, torch: str, python: str) -> None:
        self.folder = folder.resolve()
        self.python = self.folder / "bin" / "python"
        made = self.folder / "made"
        if not made.exists():
            _call(python, "-m", "venv", "--clear", self.folder)
            self._install(torch)
            made.touch()

    def _install(self, torch: str) -> None:
        """Torch, then what the project needs besides; NVIDIA's libraries are replaced by stand-ins."""
        _call(self.python, "-m", "pip", "install", "--quiet", "--no-deps", f"torch=={torch}")
        site = Path(_output(self.python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"))
        if make_stubs(site / "torch" / "lib"):
            for metadata in site.glob("torch-*.dist-info/METADATA"):
                metadata.write_text(_NVIDIA.sub("", metadata.read_text(encoding="utf-8")), encoding="utf-8")
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text("\n".join(pin for pin in pins if not pin.startswith("torch==")))
            _call(self.python, "-m", "pip", "install", "--quiet", "--constraint", constraints, "--editable", ".[dev]")
        if not (site / "triton").exists():  # builds for CPUs do not require it; its interpreter runs the GPU's kernels
            _call(self.python, "-m", "pip", "install", "--quiet", "--no-deps", "triton==3.8.0")

    def test(self, arguments: Sequence[str], called: str) -> tuple[Result, list[str]]:
        """Run pytest; returns the counts, and the names of the tests that failed. ``called``: the tests in a word."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "results.xml"
            environment = {**os.environ, "ONLINEQUANT_TEST_CACHE": folder, "PYTHONPATH": str(ROOT)}
            command = [self.python, "-m", "pytest", "--quiet", f"--junitxml={log}", *arguments]
            subprocess.run(command, cwd=ROOT, env=environment, check=False)
            cases = list(ElementTree.parse(log).iter("testcase"))
        failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        skipped = sum(case.find("skipped") is not None for case in cases)
        versions = self._versions()
        result = Result(
            *versions,
            tests=called,
            passed=len(cases) - len(failed) - skipped,
            failed=len(failed),
            skipped=skipped,
            seconds=round(time.monotonic() - started),
            date=date.today().isoformat(),
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
        )
        return result, [f"{case.get('classname')}::{case.get('name')}" for case in failed]

    def _versions(self) -> tuple[str, str, str]:
        """Of torch, triton and Python."""
        code = "from importlib.metadata import version; import platform"
        code += "; print(version('torch'), version('triton'), platform.python_version())"
        torch, triton, python = _output(self.python, "-c", code).split()
        return torch, triton, python


def _call(*command: str | Path) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
