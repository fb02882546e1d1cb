"""Which kernels there are for a device: one provider for each vendor, all of which answer the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch

from ..graph.conv_geometry import ConvGeometry
from .cpu_providers import X86, Emulated
from .formats import Format
from .nvidia.provider import Nvidia


class Provider(Protocol):
    """The kernels for one kind of device, and what depends on it. Other code asks this, not for a device's type."""

    @property
    def devices(self) -> str:
        """What to call the devices: "GPUs"."""

    @property
    def dispatch_key(self) -> str:
        """Under which torch finds the kernels: "CUDA"."""

    @property
    def kernels(self) -> ModuleType:
        """A function for each op of ``ops``; those of ``linear``, ``geglu`` and ``conv`` take ``Operands``."""

    @property
    def formats(self) -> tuple[Format, ...]:
        """What the kernels can read."""

    @property
    def attention_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the kernels for attention read."""

    @property
    def times_layers(self) -> bool:
        """Whether layers are selected, and their kernels chosen, by times measured at their shapes."""

    @property
    def captures_graphs(self) -> bool:
        """Whether a compiled call is recorded once and replayed, so that launching costs nothing."""

    @property
    def compiles_regions(self) -> bool:
        """Whether compiling takes so long that what a graph repeats is compiled once."""

    def is_for(self, device: torch.device) -> bool:
        """Whether it is for this device."""

    def format(self, precision: str, device: torch.device) -> Format | str:
        """The format that "int8" or "fp8" stands for on a device, or what is missing."""

    def fastest(self, device: torch.device) -> tuple[str, str]:
        """The precision that a device is fastest in, "float" among them, and why."""

    def capability(self, device: torch.device) -> str:
        """What tells devices apart that may need other code."""

    def lacks(self, op: str, format: Format, device: torch.device, weight: Sequence[int] = ()) -> str | None:
        """Why no single kernel computes ``op``, for weights of this shape; None if one does. ``op``: of ``ops``, or an
        operand of one, as "channel_add"."""

    def families(self, device: torch.device) -> dict[str, str | None]:
        """By family of kernels, why it is off on a device, or None if it is on."""

    def least_density(self, kind: str) -> float:
        """FLOPs per byte from which a layer of this kind, "conv", "linear" or "attention", gains by 8 bit."""

    def saturates(self, format: Format) -> bool:
        """Whether conversion to the format's activations limits them, in the code that Inductor generates."""

    def new_weight(self, shape: torch.Size, format: Format, device: torch.device) -> torch.Tensor:
        """Memory for an 8-bit weight, or a handle for it where ``format.is_packed``."""

    def pack(self, weight: torch.Tensor, q: torch.Tensor, geometry: ConvGeometry | None) -> None:
        """Store 8-bit ``q`` in what ``new_weight`` gave; ``geometry``: of a convolution."""


# The first for a device is the one that "auto" asks.
PROVIDERS: tuple[Provider, ...] = (Nvidia(), X86(), Emulated())


def providers_for(device: torch.device) -> tuple[Provider, ...]:
    """Those of a device; none where there are no 8-bit kernels, see ``why_none``."""
    return tuple(provider for provider in PROVIDERS if provider.is_for(device))


def why_none(device: torch.device) -> str:
    """Why a device has no provider."""
    if device.type == "cuda":  # as torch calls AMD's GPUs, too
        return "there are no kernels for AMD GPUs yet"
    return f"there are 8-bit kernels for NVIDIA GPUs and for x86 CPUs, and this is {device.type}"


def provider_of(format: Format, device: torch.device) -> Provider:
    """The provider of a format on a device. A graph in float may have none: then it is the device's first one, or a
    CPU's."""
    here = providers_for(device) or providers_for(torch.device("cpu"))
    return next((provider for provider in here if format in provider.formats), here[0])
