"""A checkout, a wheel, an editable install and a clone in ComfyUI all give the same packages."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.helpers.checkout import PYPROJECT, ROOT, copy_checkout, run_python

DEPENDENCIES = [Path(folder) for folder in sys.path if folder.endswith("-packages")]
ENTRY_POINTS = [
    ["console_scripts", "onlinequant", "onlinequant_backend.cli:main"],
    ["torch_dynamo_backends", "onlinequant", "onlinequant_backend.backend:onlinequant"],
]

# Where each package comes from, which of the short names (too general to share) can be seen, and which entry points of
# the distribution in SITE lead to something that can be called.
REPORT_IMPORTS = """
import importlib, importlib.metadata, importlib.util, json, os
names = ("onlinequant_backend", "onlinequant_backend.passes", "onlinequant_backend.comfy_integration")
found = importlib.metadata.distributions(path=[os.environ["SITE"]])
print(json.dumps({
    "files": {name: importlib.import_module(name).__file__ for name in names},
    "short": [name for name in ("passes", "comfy_integration") if importlib.util.find_spec(name)],
    "entry_points": sorted([e.group, e.name, e.value] for d in found for e in d.entry_points if callable(e.load())),
}))
"""

# What ComfyUI's nodes.py does with a folder in custom_nodes; the folder itself is not on sys.path.
LOAD_AS_COMFYUI = """
import importlib.util, json, os, sys
folder = os.environ["CLONE"]
name = folder.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
package = importlib.util.find_spec("onlinequant_backend")
print(json.dumps({
    "nodes": hasattr(module, "comfy_entrypoint"),
    "on_path": folder in sys.path,
    "found": package and package.origin,
}))
"""


def run_report(code: str, cwd: Path, path: Iterable[Path], **environment: str) -> dict[str, Any]:
    """The JSON that ``code`` prints, run in a new folder, where Python looks for modules on ``path`` alone."""
    cwd.mkdir()
    # -S: the .pth file of a development install would bring this checkout in.
    python_path = os.pathsep.join(map(str, path))
    return dict(
        json.loads(run_python("-S", "-c", code, cwd=cwd, PYTHONPATH=python_path, **environment).splitlines()[-1])
    )


def package_files(package: Path, others: Path) -> dict[str, str]:
    """Where each package should come from, if ``passes`` and ``comfy_integration`` lie in ``others``."""
    return {
        "onlinequant_backend": str(package / "__init__.py"),
        "onlinequant_backend.passes": str(others / "passes" / "__init__.py"),
        "onlinequant_backend.comfy_integration": str(others / "comfy_integration" / "__init__.py"),
    }


def test_listed_packages_are_the_folders() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    folders = {
        init.parent.relative_to(ROOT).as_posix()
        for top in ("onlinequant_backend", "passes", "comfy_integration")
        for init in (ROOT / top).rglob("__init__.py")
    }
    mapped = {folder: name for name, folder in setuptools["package-dir"].items()}
    expected = set()
    for folder in folders:
        top, _, below = folder.partition("/")
        expected.add(".".join([mapped[top], *below.split("/")] if below else [mapped[top]]))
    assert sorted(setuptools["packages"]) == sorted(expected)


def test_wheel_holds_our_package_alone(wheel: Path) -> None:
    files = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    version = PYPROJECT["project"]["version"]
    assert {file.parts[0] for file in files} == {"onlinequant_backend", f"onlinequant-{version}.dist-info"}
    assert Path("onlinequant_backend/py.typed") in files

    wanted = {file.relative_to(ROOT) for file in (ROOT / "onlinequant_backend").rglob("*.py")}
    for beside in ("passes", "comfy_integration"):
        wanted |= {"onlinequant_backend" / file.relative_to(ROOT) for file in (ROOT / beside).rglob("*.py")}
    assert {file for file in files if file.suffix == ".py"} == wanted


def test_unpacked_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    report = run_report(REPORT_IMPORTS, tmp_path / "elsewhere", [site, *DEPENDENCIES], SITE=str(site))
    package = site / "onlinequant_backend"
    assert report == {"files": package_files(package, package), "short": [], "entry_points": ENTRY_POINTS}


def test_editable_install_imports(tmp_path: Path) -> None:
    checkout, site = copy_checkout(tmp_path / "checkout"), tmp_path / "site"
    install = ("pip", "install", "--no-deps", "--no-build-isolation", "--target", site, "--editable", ".")
    run_python("-m", *install, cwd=checkout)
    # What an editable install consists of is a .pth file, which is heeded only in a known site-packages folder.
    code = "import os, site; site.addsitedir(os.environ['SITE'])" + REPORT_IMPORTS
    report = run_report(code, tmp_path / "elsewhere", [site, *DEPENDENCIES], SITE=str(site))
    files = package_files(checkout / "onlinequant_backend", checkout)
    assert report == {"files": files, "short": [], "entry_points": ENTRY_POINTS}


def test_checkout_imports_under_another_name(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "ComfyUI-onlinequant-main")
    report = run_report(REPORT_IMPORTS, tmp_path / "elsewhere", [checkout, *DEPENDENCIES], SITE=str(checkout))
    assert report["files"] == package_files(checkout / "onlinequant_backend", checkout)


def test_root_is_harmless_without_comfyui(tmp_path: Path) -> None:
    clone = copy_checkout(tmp_path / "ComfyUI-onlinequant-main")
    report = run_report(LOAD_AS_COMFYUI, tmp_path / "elsewhere", [], CLONE=str(clone))
    assert report == {"nodes": False, "on_path": False, "found": None}


def test_comfyui_finds_the_code_in_a_clone(tmp_path: Path) -> None:
    clone = copy_checkout(tmp_path / "ComfyUI-onlinequant-1.0")
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "folder_paths.py").touch()
    report = run_report(LOAD_AS_COMFYUI, tmp_path / "elsewhere", [comfyui], CLONE=str(clone))
    found = str(clone / "onlinequant_backend" / "__init__.py")
    assert report == {"nodes": True, "on_path": True, "found": found}
