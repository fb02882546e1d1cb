"""``onlinequant doctor``: what this machine has for 8 bit, and what it lacks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import cache, compat, listing, ops, precision
from .errors import InsecureCacheDirectoryError, OnlineQuantError
from .kernels import reference

_PACKAGES = ("torch", "triton", "safetensors", "diffusers")
_WIDTH = 100
# Float32 sums in another order than the float64 oracle; anything beyond is a wrong kernel.
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Findings:
    """What ``examine`` found.

    Attributes:
        lines: (what, value) in the order to print them in.
        obstacles: what keeps 8 bit from working, each with its remedy where there is one.
    """

    lines: list[tuple[str, str]]
    obstacles: list[str]

    @property
    def works(self) -> bool:
        """Whether a model can run in 8 bit here."""
        return not self.obstacles


def examine(cache_dir: str | None = None) -> Findings:
    """Look at versions, devices, kernels, compiler and cache directory; runs each 8-bit op once on tiny tensors.

    ``cache_dir``: as the option of that name.
    """
    lines = [("onlinequant", _version("onlinequant")), ("python", platform.python_version())]
    lines += [(name, _version(name)) for name in _PACKAGES]
    lines += _device_lines()
    obstacles: list[str] = []
    try:
        limit = round(precision.resolve("int8", torch.device("cpu")).format.weight_limit)
        lines.append(('precision="int8" on cpu', f"available, with {(limit + 1).bit_length()}-bit weights"))
    except OnlineQuantError as error:
        obstacles.append(str(error))
    else:
        outcomes = {name: _outcome(check, limit) for name, check in _KERNELS.items()}
        lines += [(f"kernel {name}", outcome) for name, outcome in outcomes.items()]
        obstacles += [f"The kernel {name} fails: {outcome}." for name, outcome in outcomes.items() if outcome != "ok"]
    compiler = _cpp_compiler()
    lines.append(("C++ compiler", compiler or "none"))
    if compiler is None:
        obstacles.append("Inductor needs a C++ compiler: install g++ or clang++, or let CXX name one.")
    try:
        cache.Cache.open(cache_dir)
    except InsecureCacheDirectoryError as error:
        obstacles.append(str(error))
    lines.append(("cache directory", _describe_cache(cache_dir)))
    return Findings(lines, obstacles)


def render(findings: Findings) -> str:
    """The findings as plain text, with the verdict as the last line."""
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None, markup=False, highlight=False)
    table = Table(box=box.SIMPLE, show_header=False, show_edge=False, pad_edge=False)
    for what, value in findings.lines:
        table.add_row(what, value)
    console.print(table)
    for obstacle in findings.obstacles:
        console.print(f"problem: {obstacle}", soft_wrap=True)
    verdict = "8-bit quantization can work here." if findings.works else "8-bit quantization cannot work here."
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + f"\n\n{verdict}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device_lines() -> list[tuple[str, str]]:
    flags = [flag for flag, there in compat.cpu_flags().items() if there]
    lines = [("CPU", f"{_cpu_name()}, {torch.get_num_threads()} threads"), ("CPU flags", ", ".join(flags) or "none")]
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"))
        devices.append(torch.device("cuda", index))
    for device in devices:
        automatic = precision.resolve("auto", device)
        lines.append((f'precision="auto" on {device}', f"{automatic.name}: {automatic.reason}"))
    return lines


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpp_compiler() -> str | None:
    """The compiler that Inductor would call, or None."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):
        return None


def _describe_cache(cache_dir: str | None) -> str:
    remedy = f"set {cache.ENVIRONMENT_VARIABLES[0]} to one that can be written"
    try:
        directory = cache.cache_directory(cache_dir).absolute()
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
    return f"{directory}, {listing.human_size(cache.directory_size(directory))}, {state}"


def _outcome(check: Callable[[int], float], limit: int) -> str:
    try:
        error = check(limit)
    except Exception as exception:
        return f"{type(exception).__name__}: {exception}".splitlines()[0]
    return "ok" if error < _TOLERANCE else f"relative error {error:.2g} against the reference"


_Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _operands(limit: int, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> _Operands:
    """What the ops take: random ``xq``, ``qparams``, an int8 weight within ``limit`` of zero, its scales and a bias."""
    generator = torch.Generator().manual_seed(0)
    scale = 0.02
    return (
        torch.randint(0, 256, x_shape, dtype=torch.uint8, generator=generator),
        torch.tensor([1 / scale, 128, scale]),
        torch.randint(-limit, limit + 1, weight_shape, dtype=torch.int8, generator=generator),
        torch.rand(weight_shape[0], generator=generator) + 0.5,
        torch.randn(weight_shape[0], generator=generator),
    )


def _check_quantize(_limit: int) -> float:
    x = torch.linspace(-1, 1, 64)
    scale = 2 / 255
    qparams = torch.tensor([1 / scale, 128, scale])
    error = (reference.dequantize(ops.quantize(x, qparams, torch.uint8, False), qparams) - x).abs().max()
    return 0.0 if error <= scale else float(error)


def _check_linear(limit: int) -> float:
    operands = _operands(limit, (5, 32), (16, 32))
    return _relative_error(ops.linear(*operands, torch.float32), reference.linear(*operands, torch.float64))


def _check_conv(limit: int, dimensions: int) -> float:
    operands = _operands(limit, (1, 16, *(6,) * dimensions), (16, 16, *(3,) * dimensions))
    ones = [1] * dimensions
    got = ops.conv(*operands, ones, ones, ones, torch.float32)
    return _relative_error(got, reference.conv(*operands, ones, ones, ones, torch.float64))


def _relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


_KERNELS: dict[str, Callable[[int], float]] = {
    "quantize": _check_quantize,
    "linear": _check_linear,
    "conv2d": lambda limit: _check_conv(limit, 2),
    "conv3d": lambda limit: _check_conv(limit, 3),
}
