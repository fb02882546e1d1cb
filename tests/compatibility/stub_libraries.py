"""Stand-ins for NVIDIA's libraries, so that a CUDA build of torch runs on a CPU without gigabytes of them.

A CUDA build is linked to cuBLAS, cuDNN and others, so without them ``import torch`` fails, although a machine without a
GPU calls none of them except to ask for devices. Each stand-in defines the functions that torch's libraries import from
it, with the same symbol versions. Each function returns 100, which is ``cudaErrorNoDevice``: torch sees no GPU.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

_LIBRARY = re.compile(r"lib(cu|nv|nccl)\w*\.so\.\d+")
_FUNCTION = re.compile(r"(cu|nv|nccl)\w+")
# The driver's library: torch looks for it only where it has found a GPU.
_DRIVER = "libcuda.so.1"

Versions = dict[str, set[str]]  # the functions of each symbol version


def make_stubs(folder: Path) -> list[str]:
    """Make a stand-in in ``folder``, which has torch's libraries, for each of NVIDIA's that they need; returns their
    names."""
    libraries: dict[str, Versions] = defaultdict(lambda: defaultdict(set))
    unversioned: set[str] = set()
    for user in sorted(folder.glob("*.so")):
        owners = _owners_of_versions(user)
        for library in _needed(user):
            libraries[library][""] = unversioned
        for function, version in _imported(user):
            if version in owners:
                libraries[owners[version]][version].add(function)
            elif not version and _FUNCTION.fullmatch(function):
                unversioned.add(function)  # the loader takes it from whichever library has it, so all may have it
    for library, versions in libraries.items():
        _build(folder / library, versions)
    return sorted(libraries)


def _needed(user: Path) -> list[str]:
    names: list[str] = re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "--wide", "--dynamic", user))
    return [name for name in names if _is_stubbed(name)]


def _owners_of_versions(user: Path) -> dict[str, str]:
    """Which of NVIDIA's libraries defines each symbol version that this library imports."""
    owners: dict[str, str] = {}
    owner = ""
    for library, version in re.findall(
        r"File: (\S+)|Name: (\S+)", _output("readelf", "--wide", "--version-info", user)
    ):
        owner = library or owner
        if version and _is_stubbed(owner):
            owners[version] = owner
    return owners


def _is_stubbed(library: str) -> bool:
    return _LIBRARY.fullmatch(library) is not None and library != _DRIVER


def _imported(user: Path) -> list[tuple[str, str]]:
    """The symbols that this library imports, each with its version or ""."""
    symbols = (line.split()[-1] for line in _output("nm", "--dynamic", "--undefined-only", user).splitlines())
    return [(name, version) for name, _, version in (symbol.partition("@") for symbol in symbols)]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _build(library: Path, versions: Mapping[str, set[str]]) -> None:
    functions = sorted(set().union(*versions.values()))
    named = {version: functions for version, functions in versions.items() if version}
    script = "".join(f"{version} {{ {' '.join(f'{name};' for name in named[version])} }};\n" for version in named)
    script_file = library.with_suffix(".map")
    script_file.write_text(script)
    command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
    command += [f"-Wl,--version-script={script_file}"] if script else []
    source = "".join(f"int {name}(void) {{ return 100; }}\n" for name in functions)
    subprocess.run([*command, "-x", "c", "-", "-o", str(library)], input=source, text=True, check=True)
    script_file.unlink()
