"""What CPUs can do with 8-bit numbers: those that have the instructions, and any that emulates a format."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import operating_system
from ..graph.conv_geometry import ConvGeometry
from ..torch_internals import hardware
from . import cpu, formats, x86
from .formats import Format
from .plain_weights import PlainWeights

_X86 = ("x86_64", "i386", "i686", "x86")


class _Cpu:
    """What all ``Provider``s of CPUs have in common."""

    devices = "CPUs"
    dispatch_key = "CPU"
    kernels = cpu
    times_layers = False
    captures_graphs = False
    compiles_regions = True  # most of a first call is spent in the C++ compiler

    def is_for(self, device: torch.device) -> bool:
        """Of any CPU."""
        return device.type == "cpu"

    def capability(self, device: torch.device) -> str:
        """The 8-bit instructions, which Inductor's code and oneDNN's layouts depend on."""
        return str(hardware.int8_instructions())

    def least_density(self, kind: str) -> float:
        """From where 8 bit pays."""
        return 20.0

    def saturates(self, format: Format) -> bool:
        """C++ conversions do not."""
        return False


class X86(_Cpu):
    """See ``Provider``: oneDNN, with weights of its own layout."""

    formats = (formats.ONEDNN, formats.ONEDNN_7)
    attention_dtypes = ()

    def format(self, precision: str, device: torch.device) -> Format | str:
        """int8 alone."""
        if precision != "int8":
            return f"CPUs have no {precision} instructions"
        processor = operating_system.processor()
        # oneDNN's int8 is right on Arm, too, but nobody has measured whether it is faster than float.
        if processor not in _X86:
            return f"the 8-bit kernels for CPUs are for x86, and this one is {processor}"
        if not hardware.onednn_has_int8():
            return "this torch has no oneDNN int8 kernels for this CPU"
        return formats.ONEDNN_7 if hardware.int8_instructions() is None else formats.ONEDNN

    def fastest(self, device: torch.device) -> tuple[str, str]:
        """int8 with the right instructions, else float."""
        format = self.format("int8", device)
        if isinstance(format, str):
            return "float", format
        instructions = hardware.int8_instructions()
        if instructions is None:
            return "float", 'this CPU has no VNNI or AMX 8-bit instructions (precision="int8" forces 8 bit)'
        return "int8", f"this CPU has {instructions}"

    def lacks(self, op: str, format: Format, device: torch.device, weight: Sequence[int] = ()) -> str | None:
        """What is fused costs as much as its parts."""
        return None if op in ("linear", "conv") else f"fusing {op} gains nothing on a CPU"

    def families(self, device: torch.device) -> dict[str, str | None]:
        """All kernels are oneDNN's."""
        format = self.format("int8", device)
        return {"oneDNN int8": format if isinstance(format, str) else None}

    def new_weight(self, shape: torch.Size, format: Format, device: torch.device) -> torch.Tensor:
        """A handle."""
        return x86.new_handle(shape)

    def pack(self, weight: torch.Tensor, q: torch.Tensor, geometry: ConvGeometry | None) -> None:
        """In oneDNN's layout, behind the handle."""
        x86.pack(weight, q, geometry)


class Emulated(PlainWeights, _Cpu):
    """See ``Provider``: what GPUs compute in, to see what that does to a picture. As slow as float."""

    formats = (formats.INT8, formats.FP8)
    attention_dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def format(self, precision: str, device: torch.device) -> Format | str:
        """Fp8 if it is asked for; int8 is oneDNN's."""
        return formats.FP8 if precision == "fp8" else f"{precision} is not emulated"

    def fastest(self, device: torch.device) -> tuple[str, str]:
        """Nothing is."""
        return "float", "emulated formats are not faster than float"

    def lacks(self, op: str, format: Format, device: torch.device, weight: Sequence[int] = ()) -> str | None:
        """Nothing: graphs are as they are for a GPU."""
        return None

    def families(self, device: torch.device) -> dict[str, str | None]:
        """Plain torch, which is everywhere."""
        return {"emulation": None}
