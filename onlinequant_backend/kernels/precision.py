"""Which 8-bit precision a device is fast at, and why."""

from __future__ import annotations

import dataclasses
import importlib.util

import torch

from .. import errors
from ..torch_internals import hardware
from . import formats
from .formats import Format


@dataclasses.dataclass(frozen=True)
class Precision:
    """What layers on a device are computed in.

    Attributes:
        name: "int8", "fp8" or "float".
        reason: why this one; never empty.
        format: how 8-bit numbers are stored.
    """

    name: str
    reason: str
    format: Format = formats.ONEDNN


def resolve(requested: str, device: torch.device) -> Precision:
    """The precision to use on ``device``; raises PrecisionUnavailableError for one asked for by name but not there."""
    if requested == "float":
        return Precision("float", 'precision="float" was asked for')
    if requested == "auto":
        return _automatic(device)
    format = _format(requested, device)
    if isinstance(format, Format):
        return Precision(requested, f'precision="{requested}" was asked for', format)
    raise errors.PrecisionUnavailableError(
        f"precision={requested!r} has no kernels here: {format}. "
        'precision="auto" takes what this device is fast at, and float where there is nothing.'
    )


def _format(precision: str, device: torch.device) -> Format | str:
    """The format that "int8" or "fp8" stands for on a device, or what is missing."""
    if device.type == "cuda":
        return _cuda_format(precision, device)
    if device.type != "cpu":
        return f"there are 8-bit kernels for CUDA and for x86 CPUs, and this is {device.type}"
    if precision == "fp8":
        return formats.FP8  # emulated in float: to see what fp8 does to a picture
    return _cpu_format() if _onednn_has_int8() else "this torch has no oneDNN int8 kernels for this CPU"


def _cuda_format(precision: str, device: torch.device) -> Format | str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, which CUDA builds of torch bring along"
    capability = torch.cuda.get_device_capability(device)
    needed = (8, 9) if precision == "fp8" else (8, 0)  # Triton has no int8 products for older ones
    if capability < needed:
        have, need = (".".join(map(str, version)) for version in (capability, needed))
        return f"this GPU's compute capability is {have}, and {precision} needs {need}"
    return formats.FP8 if precision == "fp8" else formats.INT8


def _automatic(device: torch.device) -> Precision:
    if device.type == "cuda":
        for name in ("fp8", "int8"):
            format = _cuda_format(name, device)
            if isinstance(format, Format):
                return Precision(name, f"this GPU has {name} matrix instructions", format)
        return Precision("float", str(format))
    if device.type != "cpu":
        return Precision("float", f"there are no 8-bit kernels for {device.type}")
    if not _onednn_has_int8():
        return Precision("float", "this torch has no oneDNN int8 kernels for this CPU")
    instructions = hardware.int8_instructions()
    if instructions is None:
        return Precision("float", 'this CPU has no VNNI or AMX 8-bit instructions (precision="int8" forces 8 bit)')
    return Precision("int8", f"this CPU has {instructions}", _cpu_format())


def _cpu_format() -> Format:
    return formats.ONEDNN_7 if hardware.int8_instructions() is None else formats.ONEDNN


def _onednn_has_int8() -> bool:
    return torch.backends.mkldnn.is_available() and "onednn" in torch.backends.quantized.supported_engines
