"""A copy of the checkout, and the distributions that are built from one. Nothing here needs a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def copy_checkout(to: Path) -> Path:
    """A clone's files, without those that are made here (a build must not pick up an old one's)."""
    made = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "shared")
    return Path(shutil.copytree(ROOT, to, ignore=made))


def run_python(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """Run Python with these arguments and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_sdist(folder: Path) -> Path:
    """The source distribution of this checkout, built in an empty folder."""
    checkout = copy_checkout(folder / "checkout")
    run_python("-c", "import setuptools.build_meta as build; build.build_sdist('dist')", cwd=checkout)
    (built,) = checkout.glob("dist/*.tar.gz")
    return built


def build_wheel(sdist: Path, folder: Path) -> Path:
    """The wheel of a source distribution, as ``python -m build`` makes it."""
    shutil.unpack_archive(sdist, folder)
    (source,) = folder.iterdir()
    run_python("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", cwd=source)
    (built,) = source.glob("dist/*.whl")
    return built
