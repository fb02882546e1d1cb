"""Which 8-bit precision a device is fast at, and why."""

from __future__ import annotations

import dataclasses

import torch

from . import compat, errors


@dataclasses.dataclass(frozen=True)
class Precision:
    """What layers on a device are computed in.

    Attributes:
        name: "int8" or "float".
        reason: why this one; never empty.
        weight_bits: bits of an 8-bit weight that are used. 7 on CPUs without VNNI or AMX, whose multiply-add sums two
            products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 would saturate. Weights spread more evenly over
            their range than activations do, so they can better spare the bit.
    """

    name: str
    reason: str
    weight_bits: int = 8


def resolve(requested: str, device: torch.device) -> Precision:
    """The precision to use on ``device``; raises PrecisionUnavailableError for one asked for by name but not there."""
    if requested == "float":
        return Precision("float", 'precision="float" was asked for')
    if requested == "auto":
        return _automatic(device)
    if requested == "int8" and device.type == "cpu" and _onednn_has_int8():
        return Precision("int8", 'precision="int8" was asked for', _cpu_weight_bits())
    raise errors.PrecisionUnavailableError(
        f"precision={requested!r} has no kernels for {device.type}. "
        'There are int8 kernels for x86 CPUs; use precision="auto" to run in float where there are none.'
    )


def _automatic(device: torch.device) -> Precision:
    if device.type != "cpu":
        return Precision("float", f"there are no 8-bit kernels for {device.type} yet")
    if not _onednn_has_int8():
        return Precision("float", "this torch has no oneDNN int8 kernels for this CPU")
    instructions = compat.int8_instructions()
    if instructions is None:
        return Precision("float", 'this CPU has no VNNI or AMX 8-bit instructions (precision="int8" forces 8 bit)')
    return Precision("int8", f"this CPU has {instructions}", _cpu_weight_bits())


def _cpu_weight_bits() -> int:
    return 7 if compat.int8_instructions() is None else 8


def _onednn_has_int8() -> bool:
    return torch.backends.mkldnn.is_available() and "onednn" in torch.backends.quantized.supported_engines
