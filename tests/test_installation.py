"""What pip installs, replaces and removes, and what ComfyUI's registry and manager read. Nothing is downloaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.checkout import PYPROJECT, ROOT, copy_checkout, run_python

DEPENDENCIES = [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
REQUIREMENTS = [
    Requirement(line)
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
TORCH = {"torch", "torchaudio", "torchvision", "triton"}  # what ComfyUI's users have in a build for their GPU
COMFY = PYPROJECT["tool"]["comfy"]
IGNORED = [
    line.strip("/") for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")
]  # folders and files at the root, from which the registry's archive is made without

# A short run of the public interface, which also writes whatever importing the package writes.
USE = """
import onlinequant_backend
from onlinequant_backend.cli import main
assert main(["stats"]) == 0
assert "onlinequant" in __import__("torch").compiler.list_backends()
print(onlinequant_backend.__version__)
"""


class Environment:
    """A virtual environment without pip and without packages."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        (self.python,) = folder.glob("[bS]*/python")
        (self.site,) = folder.rglob("site-packages")

    def pretend(self, name: str, version: str) -> None:
        """Have pip believe that a distribution is installed."""
        about = self.site / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "RECORD").touch()

    def pip(self, *arguments: str | Path) -> str:
        """Run it without the settings of this machine, which may name another index or a constraint."""
        command = ("-m", "pip", "--isolated", "--python", self.python)
        return run_python(*command, *arguments, cwd=self.folder, PIP_CONFIG_FILE=os.devnull)

    def would_install(self, *what: str | Path) -> dict[str, str]:
        """The names and versions that ``pip install`` would install, without an index."""
        report = self.folder / "report.json"
        self.pip("install", "--dry-run", "--no-index", "--report", report, *what)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        return {item["name"]: item["version"] for item in found}

    def files(self) -> set[Path]:
        return {path.relative_to(self.folder) for path in self.folder.rglob("*")}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """One with all dependencies but torch, as pip sees it."""
    made = Environment(tmp_path / "venv")
    for dependency in DEPENDENCIES:
        if dependency.name != "torch":
            made.pretend(dependency.name, metadata.version(dependency.name))
    return made


@pytest.mark.parametrize("version", ["2.11.0", "2.15.0", "2.15.0+cu130", "2.16.0"])
def test_pip_leaves_torch_alone(environment: Environment, wheel: Path, version: str) -> None:
    environment.pretend("torch", version)
    assert environment.would_install(wheel) == {"onlinequant": PYPROJECT["project"]["version"]}
    assert environment.would_install("-r", ROOT / "requirements.txt") == {}


def test_pip_says_that_torch_is_too_old(environment: Environment, wheel: Path) -> None:
    """So the test above can fail: what is installed is looked at."""
    environment.pretend("torch", "1.13.0")
    with pytest.raises(AssertionError, match="No matching distribution found for torch"):
        environment.would_install(wheel)


def test_torch_has_no_upper_bound() -> None:
    (torch,) = (dependency for dependency in DEPENDENCIES if dependency.name == "torch")
    assert {bound.operator for bound in torch.specifier} == {">="}


def test_requirements_are_the_dependencies_without_torch() -> None:
    assert [dependency for dependency in DEPENDENCIES if dependency.name != "torch"] == REQUIREMENTS


def test_no_requirement_needs_torch() -> None:
    """Neither do those that it needs, and so on."""
    needed, left = set(), [requirement.name for requirement in REQUIREMENTS]
    while left:
        name = left.pop().lower()
        if name in needed:
            continue
        needed.add(name)
        try:
            found = [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:  # for another system
            continue
        left += [each.name for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    assert len(needed) > len(REQUIREMENTS) and not needed & TORCH


def test_uninstalling_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    before = environment.files()
    environment.pip("install", "--no-index", "--no-deps", wheel)
    assert environment.files() > before
    # The dependencies come from the environment of the tests; no .pth file of that is read from here.
    folders = {str(Path(str(metadata.distribution(name).locate_file("")))) for name in ("torch", "numpy", "rich")}
    code = f"import sys; sys.path += {sorted(folders)}" + USE
    done = subprocess.run([environment.python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith(PYPROJECT["project"]["version"] + "\n"), done.stderr
    environment.pip("uninstall", "--yes", "onlinequant")
    assert environment.files() == before


def test_what_the_registry_asks_for() -> None:
    """The rules of its specification, which ``comfy node validate`` checks in part."""
    project = PYPROJECT["project"]
    assert re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9])*", project["name"]) and len(project["name"]) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert COMFY["PublisherId"] and COMFY["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", COMFY["requires-comfyui"])
    # A classifier that it does not know would have it drop all of the kind.
    systems = [text for text in project["classifiers"] if text.startswith("Operating System :: ")]
    devices = [text for text in project["classifiers"] if text.startswith("Environment :: ")]
    assert systems and all(
        text.split(" :: ")[1] in ("Microsoft", "POSIX", "MacOS", "OS Independent") for text in systems
    )
    assert devices == ["Environment :: GPU :: NVIDIA CUDA"]
    # Where something that needs an address is said, there is one.
    urls = [COMFY.get("Icon"), COMFY.get("Banner"), *project.get("urls", {}).values()]
    assert all(url is None or url.startswith("https://") for url in urls)


def test_the_registry_gets_what_comfyui_loads(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    kept = {path.name for path in checkout.iterdir()} - set(IGNORED)
    assert all((ROOT / entry).exists() for entry in IGNORED)
    assert kept == {
        *("__init__.py", "requirements.txt", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"),
        *("onlinequant_backend", "passes", "comfy_integration", "example_workflows"),
    }
