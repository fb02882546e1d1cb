"""What ``doctor`` says that depends on the operating system and on the vendor of the GPU."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch

from .. import operating_system
from ..kernels.provider import providers_for
from ..torch_internals import parts

# Whoever builds Triton for a system or vendor gives it a name of its own; all of them are imported as ``triton``.
_TRITONS = ("triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu", "triton-xpu")
# Characters that paths have below the cache directory, as measured: those of AOTAutograd's cache within Inductor's.
_PATH_LENGTH = 159


def triton_version() -> str:
    """The version of whichever Triton is installed."""
    for name in _TRITONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if name == "triton" else f"{version} ({name})"
    return "not installed"


def accelerators() -> list[torch.device]:
    """The devices besides the CPU that torch can use."""
    count = torch.cuda.device_count()
    if count:
        return [torch.device("cuda", index) for index in range(count)]
    found = torch.accelerator.current_accelerator(check_available=True)
    return [] if found is None or found.type == "cuda" else [torch.device(found.type)]


def describe(device: torch.device) -> str:
    """An accelerator's name and what its kernels depend on."""
    if device.type != "cuda":
        return f"{device.type}, for which this package has no kernels"
    if not providers_for(device):
        return f"{torch.cuda.get_device_name(device)}, through ROCm {torch.version.hip}"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{torch.cuda.get_device_name(device)}, compute capability {capability}"


def compiler() -> tuple[str | None, str]:
    """The C++ compiler that Inductor would call, or None and the remedy."""
    if parts.lacks(parts.COMPILER_NAME):
        return "not looked for", ""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler(), ""
    except (exc.InvalidCxxCompiler, OSError):
        return None, f"Inductor needs a C++ compiler: {_compiler_remedy()}, or let CXX name one."
    except RuntimeError as error:  # on Windows, one that speaks another language than English
        return None, f"Inductor cannot use the C++ compiler: {error}"


def _compiler_remedy() -> str:
    if operating_system.is_windows():
        return (
            'install the "Desktop development with C++" of Visual Studio\'s Build Tools, in English, and start Python '
            'from its "x64 Native Tools Command Prompt"'
        )
    return "run xcode-select --install" if operating_system.is_mac() else "install g++ or clang++"


def path_note(cache: Path) -> str:
    """That paths of compiled code below the cache directory are too long for Windows; empty if they are not."""
    missing = operating_system.missing_characters(cache, _PATH_LENGTH)
    if not missing:
        return ""
    return (
        f". But Windows limits paths to 260 characters, and those of compiled code are {missing} longer: enable long "
        r"paths (HKLM\SYSTEM\CurrentControlSet\Control\FileSystem, LongPathsEnabled = 1), or let ONLINEQUANT_CACHE_DIR "
        r"name a folder with a short path, such as C:\oq"
    )
