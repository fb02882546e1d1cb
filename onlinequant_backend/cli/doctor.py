"""``onlinequant doctor``: what this machine has for 8 bit, and what it lacks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from .. import operating_system, tested_torch
from ..cache import atomic_files, cache_store, listing
from ..errors import InsecureCacheDirectoryError, OnlineQuantError
from ..kernels import precision
from ..kernels.formats import Format
from ..kernels.provider import provider_of, providers_for
from ..torch_internals import hardware, parts
from . import kernel_check
from .system_check import accelerators, compiler, describe, path_note, triton_version

_PACKAGES = ("torch", "safetensors", "diffusers")


@dataclasses.dataclass(frozen=True)
class Findings:
    """What ``examine`` found.

    Attributes:
        lines: (what, value) in the order to print them in.
        obstacles: what keeps 8 bit from working, each with its remedy where there is one.
        devices: where it works nevertheless.
        float_devices: those that have no 8-bit kernels.
    """

    lines: list[tuple[str, str]]
    obstacles: list[str]
    devices: list[str]
    float_devices: list[str] = dataclasses.field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether a model can run in 8 bit wherever this machine could."""
        return not self.obstacles


def examine(cache_dir: str | None = None) -> Findings:
    """Look at versions, devices, kernels, compiler and cache directory; runs each 8-bit op once on tiny tensors.

    ``cache_dir``: as the option of that name.
    """
    lines = [("onlinequant", _version("onlinequant")), ("python", platform.python_version())]
    lines += [("triton", triton_version()), *((name, _version(name)) for name in _PACKAGES)]
    lines.append(("tested", tested_torch.describe(torch.__version__)))
    lines += [("absent", absence) for absence in parts.absences()]
    lines += _device_lines()
    found = [_examine_cpu()]
    if torch.cuda.device_count():
        found.append(_examine_gpu(torch.device("cuda", 0)))  # the one that is meant by "cuda"
    lines += [line for part in found for line in part.lines]
    obstacles = [obstacle for part in found for obstacle in part.obstacles]
    devices = [device for part in found for device in part.devices]
    if (lack := parts.why_float()) is not None:
        obstacles.append(f"{lack}: models stay in float.")
        devices = []
    cpp_compiler, remedy = compiler()
    lines.append(("C++ compiler", cpp_compiler or "none"))
    if cpp_compiler is None:
        # On Windows, Triton brings a C compiler along, and so needs no other one for a GPU.
        devices = [device for device in devices if device != "cpu" and operating_system.is_windows()]
        obstacles.append(remedy)
    try:
        cache_store.Cache.open(cache_dir)
    except InsecureCacheDirectoryError as error:
        devices = []
        obstacles.append(str(error))
    lines.append(("cache directory", _describe_cache(cache_dir)))
    return Findings(lines, obstacles, devices, [str(device) for device in accelerators() if not providers_for(device)])


def render(findings: Findings) -> str:
    """The findings as plain text, with the verdict as the last line."""
    width = max(len(what) for what, _ in findings.lines)
    lines = [f"{what:<{width}}  {value}" for what, value in findings.lines]  # none folded: paths are to be copied
    lines += [f"problem: {obstacle}" for obstacle in findings.obstacles]
    if findings.works and not findings.float_devices:
        verdict = "can work here"
    else:
        verdict = f"can work on {', '.join(findings.devices)} only" if findings.devices else "cannot work here"
    return "\n".join([*lines, "", f"8-bit quantization {verdict}."])


def _examine_cpu() -> Findings:
    device = torch.device("cpu")
    try:
        format = precision.resolve("int8", device).format
    except OnlineQuantError as error:
        return Findings([], [str(error)], [])
    outcomes = _outcomes(kernel_check.CPU_CHECKS, format, device)
    bits = (round(format.weight_limit) + 1).bit_length()
    lines = [('precision="int8" on cpu', f"available, with {bits}-bit weights")]
    lines += [(f"kernel {name}", "ok" if passed else text) for name, (passed, text) in outcomes.items()]
    obstacles = [f"The kernel {name} fails: {text}." for name, (passed, text) in outcomes.items() if not passed]
    return Findings(lines, obstacles, [] if obstacles else ["cpu"])


def _examine_gpu(device: torch.device) -> Findings:
    automatic = precision.resolve("auto", device)
    capability = torch.cuda.get_device_capability(device)
    if not providers_for(device) or capability < (8, 0):  # nothing to be done about it
        return Findings([], [], [])
    if automatic.name == "float":
        obstacle = f"No 8 bit on {device}: {automatic.reason}. pip install '{_triton_requirement()}'"
        return Findings([], [obstacle], [])
    # A GEGLU without a kernel is left to Inductor.
    provider = provider_of(automatic.format, device)
    has_geglu = provider.lacks("geglu", automatic.format, device, kernel_check.GEGLU_WEIGHT) is None
    checks = {name: check for name, check in kernel_check.GPU_CHECKS.items() if has_geglu or name != "geglu"}
    outcomes = _outcomes(checks, automatic.format, device)
    lines = [
        (f"kernel {name} on {device}", f"ok, {text}" if passed else text) for name, (passed, text) in outcomes.items()
    ]
    failed = [name for name, (passed, _) in outcomes.items() if not passed]
    if not failed:
        return Findings(lines, [], [str(device)])
    remedy = (
        f"Triton builds them with a C compiler, for this torch and the driver: have gcc, a driver that is new enough "
        f"for CUDA {torch.version.cuda}, and pip install '{_triton_requirement()}'."
    )
    return Findings(lines, [f"Kernels fail on {device} ({', '.join(failed)}). {remedy}"], [])


def _outcomes(
    checks: Mapping[str, kernel_check.Check], format: Format, device: torch.device
) -> dict[str, kernel_check.Outcome]:
    return {name: kernel_check.outcome(check, format, device) for name, check in checks.items()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _triton_requirement() -> str:
    """How pip names the triton that this torch was made for."""
    if operating_system.is_windows():  # torch requires none there
        return "triton-windows"
    required = importlib.metadata.requires("torch") or []
    return next((text.partition(";")[0].strip() for text in required if text.startswith("triton")), "triton")


def _device_lines() -> list[tuple[str, str]]:
    flags = [flag for flag, there in hardware.cpu_flags().items() if there]
    lines = [("CPU", f"{_cpu_name()}, {torch.get_num_threads()} threads"), ("CPU flags", ", ".join(flags) or "none")]
    devices = [torch.device("cpu")]
    for index, device in enumerate(accelerators()):
        lines.append((f"GPU {index}", describe(device)))
        devices.append(device)
    if len(devices) == 1:
        made_for = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        lines.append(("GPU", f"none seen by this torch, which was built {made_for}"))
    elif torch.version.hip is None and devices[1].type == "cuda":
        driver = _first_match(Path("/proc/driver/nvidia/version"), r"Module.*?(\d+\.[\d.]+)")
        lines.append(("NVIDIA driver", f"{driver or 'unknown'}; this torch was built for CUDA {torch.version.cuda}"))
    for device in devices:
        automatic = precision.resolve("auto", device)
        lines.append((f'precision="auto" on {device}', f"{automatic.name}: {automatic.reason}"))
        lines += _family_lines(device)
    return lines


def _family_lines(device: torch.device) -> list[tuple[str, str]]:
    """Which families of kernels are on, and why others are off."""
    return [
        (f"{family} on {device}", "on" if reason is None else f"off: {reason}")
        for provider in providers_for(device)
        for family, reason in provider.families(device).items()
    ]


def _cpu_name() -> str:
    name = _first_match(Path("/proc/cpuinfo"), r"model name\s*: (.+)")
    return name or platform.processor() or operating_system.processor()


def _first_match(path: Path, pattern: str) -> str | None:
    """The first group of ``pattern`` in a file of Linux's."""
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8"))
    except OSError:  # not Linux
        return None
    return found and found[1].strip()


def _describe_cache(cache_dir: str | None) -> str:
    remedy = f"set {cache_store.ENVIRONMENT_VARIABLES[0]} to one that can be written"
    try:
        directory = cache_store.cache_directory(cache_dir).absolute()
    except OSError as error:
        return f"none ({error}): {remedy}"
    state = "can be written"
    try:
        # The nearest folder that is there decides whether the rest can be made.
        existing = next(folder for folder in (directory, *directory.parents) if folder.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        state = f"cannot be written ({error.strerror}): {remedy}"
    return f"{directory}, {listing.human_size(atomic_files.directory_size(directory))}, {state}{path_note(directory)}"
