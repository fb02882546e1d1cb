"""What NVIDIA GPUs can do with 8-bit numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from ... import operating_system
from .. import formats
from ..formats import Format
from ..plain_weights import PlainWeights
from . import families, operators, tuning
from .gpu import gpu_of


class Nvidia(PlainWeights):
    """See ``Provider``: cuBLAS, Triton and Gluon."""

    devices = "GPUs"
    dispatch_key = "CUDA"
    kernels = operators
    formats = (formats.INT8, formats.FP8)
    attention_dtypes = (torch.float16, torch.bfloat16)
    times_layers = True
    captures_graphs = True
    compiles_regions = False

    def is_for(self, device: torch.device) -> bool:
        """Of GPUs that torch calls "cuda", those that are not AMD's."""
        return device.type == "cuda" and torch.version.hip is None

    def format(self, precision: str, device: torch.device) -> Format | str:
        """By the compute capability; Triton has no int8 products for GPUs before 8.0."""
        if importlib.util.find_spec("triton") is None:
            if operating_system.is_windows():
                return "Triton is not installed: pip install triton-windows, of the version that this torch needs"
            return "Triton is not installed, which CUDA builds of torch bring along"
        capability = torch.cuda.get_device_capability(device)
        needed = (8, 9) if precision == "fp8" else (8, 0)
        if capability < needed:
            have, need = (".".join(map(str, version)) for version in (capability, needed))
            return f"this GPU's compute capability is {have}, and {precision} needs {need}"
        return formats.FP8 if precision == "fp8" else formats.INT8

    def fastest(self, device: torch.device) -> tuple[str, str]:
        """fp8 before int8, which rounds what is small relative to the rest away."""
        for precision in ("fp8", "int8"):
            format = self.format(precision, device)
            if isinstance(format, Format):
                return precision, f"this GPU has {precision} matrix instructions"
        return "float", str(format)

    def capability(self, device: torch.device) -> str:
        """The compute capability."""
        return "{}.{}".format(*torch.cuda.get_device_capability(device))

    def lacks(self, op: str, format: Format, device: torch.device, weight: Sequence[int] = ()) -> str | None:
        """GEGLU is for GPUs and shapes that the tensor memory accelerator can fetch."""
        if format not in self.formats:
            return f"GPUs have no kernels for {format.name}"
        if op == "geglu" and weight and tuning.geglu_tile(weight[1], gpu_of(device)) is None:
            return f"no kernel has {weight[1]} inputs on this GPU"
        return None

    def families(self, device: torch.device) -> dict[str, str | None]:
        """By the compute capability and by what Triton has."""
        return families.families(torch.cuda.get_device_capability(device))

    def least_density(self, kind: str) -> float:
        """A GPU waits for its memory until far more than a CPU."""
        return {"conv": 100.0, "linear": 300.0, "attention": 1000.0}[kind]

    def saturates(self, format: Format) -> bool:
        """In Triton's conversion to float8 the instruction does (PTX ``cvt.rn.satfinite.e4m3x2.f32``). Clamping before
        made Inductor's LayerNorm a third slower."""
        return format.activation.is_floating_point
