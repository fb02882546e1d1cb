"""A release: one version everywhere, distributions with what they need and no more, workflows that are pinned."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

import onlinequant_backend
from tests.helpers.checkout import PYPROJECT, ROOT

VERSION = PYPROJECT["project"]["version"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PACKAGES = ("comfy_integration", "onlinequant_backend", "passes")
MEGABYTES = 6  # of which the model of scenes takes 5.3


def test_version_is_the_same_everywhere() -> None:
    assert onlinequant_backend.__version__ == VERSION
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", changelog, re.M)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(VERSION)}\] - \d{{4}}-\d\d-\d\d", headings[1])


def test_pythons_are_the_same_everywhere() -> None:
    """Those that the classifiers name are those that the workflow tests."""
    prefix = "Programming Language :: Python :: 3."
    named = [
        "3." + text.removeprefix(prefix) for text in PYPROJECT["project"]["classifiers"] if text.startswith(prefix)
    ]
    tested = re.search(r"^ +python: \[(.+)\]$", (ROOT / ".github/workflows/ci.yml").read_text(), re.M)
    assert tested is not None and named == re.findall(r'"([^"]+)"', tested[1])
    assert PYPROJECT["project"]["requires-python"] == f">={named[0]}"


def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    """And nothing else; that the wheel is built from it shows that nothing is missing."""
    with tarfile.open(sdist) as archive:
        files = [Path(*Path(member.name).parts[1:]) for member in archive.getmembers() if member.isfile()]
    beside = {file.as_posix() for file in files if file.parts[0] not in (*PACKAGES, "onlinequant.egg-info")}
    texts = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md"}
    assert beside == texts | {"PKG-INFO", "pyproject.toml", "setup.cfg"}
    assert {file.suffix for file in files if file.parts[0] in PACKAGES} == {".py", ".typed", ".safetensors"}
    assert sdist.stat().st_size < MEGABYTES * 2**20


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_pinned_and_may_do_little(workflow: Path) -> None:
    text = workflow.read_text()
    used = re.findall(r"uses: (.+)", text)
    assert used and all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used)
    assert set(re.findall(r"\w[\w-]*: write", text)) <= {"id-token: write"}
    assert re.search(r"^permissions:( \{\}|\n  contents: read)$", text, re.M)
    assert re.search(r"^concurrency:$", text, re.M)
    assert text.count("timeout-minutes:") == text.count("runs-on:")


def test_ci_runs_what_a_submission_must_pass() -> None:
    assert "run: bash .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()
