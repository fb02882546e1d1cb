"""The rules of ``pyproject.toml``'s [tool.importlinter], and those that no linter checks: doors, sizes and names."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "onlinequant_backend"
BESIDE = ("passes", "comfy_integration")  # in a wheel they lie inside the package
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]

SOURCES = sorted(
    path
    for top in ("onlinequant_backend", *BESIDE, "example_workflows", "benchmarks")
    for path in (ROOT / top).rglob("*.py")
)
DOORS = [path for path in SOURCES if path.name == "__init__.py" and path.parent != PACKAGE]

FILE_LINES, CLASS_LINES = 350, 250
NAMES_OF_A_DOOR = 6
SENTENCES, WORDS = 2, 25  # of a paragraph
# Words that say nothing about a module's content to somebody who has not read it.
VAGUE_NAMES = {
    *("ahead", "agreement", "changes", "choice", "entry", "files", "hollow", "layers"),
    *("merged", "repeats", "samples", "sizes", "traced", "trouble", "watch"),
}

# Imports every package below ours, and prints which of them was the first to load what.
REPORT_LOADED = """
import importlib, json, sys
rooms, heavy = json.loads(sys.argv[1])
loaded = {}
for room in rooms:
    importlib.import_module(room)
    for name in heavy:
        if name in sys.modules:
            loaded.setdefault(name, room)
print(json.dumps(loaded))
"""
# Not Triton itself, which Dynamo loads; these are for those who compile, measure or draw.
HEAVY = (
    "torch._inductor.compile_fx",
    "torch._inductor.async_compile",
    "onlinequant_backend.kernels.nvidia.matmul",
    "matplotlib",
    "diffusers",
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as a wheel would install it, beside the contracts."""
    site = tmp_path_factory.mktemp("site")
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, site / PACKAGE.name, ignore=without_caches)
    for name in BESIDE:
        shutil.copytree(ROOT / name, site / PACKAGE.name / name, ignore=without_caches)
    shutil.copy(ROOT / "pyproject.toml", site)
    return site


def lint_imports(site: Path, contract: str) -> subprocess.CompletedProcess[str]:
    """What import-linter says of one contract."""
    run = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(None, (sys.argv[1],), no_logo=True))"
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", run, contract]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("contract", [contract["id"] for contract in CONTRACTS])
def test_imports_keep_the_contract(contract: str, installed: Path) -> None:
    done = lint_imports(installed, contract)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_an_import_from_below_breaks_the_contract(installed: Path, tmp_path: Path) -> None:
    site = Path(shutil.copytree(installed, tmp_path / "site"))
    with (site / PACKAGE.name / "tensors.py").open("a") as file:
        file.write("\nfrom onlinequant_backend.passes import context\n")
    done = lint_imports(site, "layers")
    assert done.returncode == 1
    assert "onlinequant_backend.tensors -> onlinequant_backend.passes" in " ".join(done.stdout.split())


def handed_out(path: Path) -> set[str]:
    """The names that a door hands out: ``__all__``, or else what it imports or defines without an underscore."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            if "__all__" in (target.id for target in node.targets if isinstance(target, ast.Name)):
                return set(ast.literal_eval(node.value))
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(PACKAGE.name)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return {name for name in names if not name.startswith("_")}


def is_paragraph(text: str) -> bool:
    sentences = sum(text.count(end) for end in (". ", ".\n")) + text.endswith(".")
    return sentences >= SENTENCES and len(text.split()) >= WORDS


def test_doors_say_what_is_behind_them() -> None:
    texts = {relative(door): ast.get_docstring(ast.parse(door.read_text())) or "" for door in DOORS}
    assert {door: text for door, text in texts.items() if not is_paragraph(text)} == {}


def test_doors_hand_out_few_names() -> None:
    names = {relative(door): handed_out(door) for door in DOORS}
    assert {door: some for door, some in names.items() if len(some) > NAMES_OF_A_DOOR} == {}


def test_importing_a_room_loads_no_compiler_and_no_kernel(installed: Path) -> None:
    package = installed / PACKAGE.name
    inits = sorted(
        init.relative_to(installed).parent for init in package.rglob("__init__.py") if init.parent != package
    )
    rooms = [".".join(init.parts) for init in inits]
    assert len(rooms) > 10
    command = [sys.executable, "-c", REPORT_LOADED, json.dumps([rooms, HEAVY])]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {}


def test_files_are_short() -> None:
    lengths = {relative(source): len(source.read_text().splitlines()) for source in SOURCES}
    assert {source: lines for source, lines in lengths.items() if lines > FILE_LINES} == {}


def test_classes_are_short() -> None:
    lengths = {
        f"{relative(source)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > CLASS_LINES} == {}


def test_module_names_say_something() -> None:
    assert [relative(source) for source in SOURCES if source.stem in VAGUE_NAMES] == []


def test_tests_share_helpers_and_nothing_else() -> None:
    importing = {}
    for source in sorted((ROOT / "tests").rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ImportFrom)]
        names = [f"{node.module}.{alias.name}" for node in nodes for alias in node.names]
        importing[relative(source)] = [name for name in names if re.match(r"tests\.(\w+\.)*test_", name)]
    assert {source: names for source, names in importing.items() if names} == {}
