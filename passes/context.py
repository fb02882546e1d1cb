"""What a pass is told about the graph that it changes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from onlinequant_backend.config import QuantConfig
from onlinequant_backend.graph import LayerInfo
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.kernels.provider import Provider, provider_of

_log = logging.getLogger("onlinequant")


@dataclasses.dataclass
class PassContext:
    """What the passes are told, and what they hand on to each other.

    Attributes:
        config, precision: the user's options and what the device resolves them to.
        measured: whether the layers' sensitivities have been measured.
        unusable: by layer name, what observing found that rules a layer out.
        freed: indices of the layers whose float weight is gone, so that they must be in 8 bit.
        selection: indices of the layers to rewrite; None means all that are ``LayerInfo.quantized``.
        device: where the graph runs.
        at_largest: each of these layers, by name, at the largest size that its model was traced at.
        smoothing: what identifies the factors that a layer's input is smoothed by, by the layer's index, if it is.
        merge: makes one weight of those of several layers, by their indices; returns whether it could.
        extra_inputs: inputs that rewriting appended, in order: (what, index of the layer or indices of merged ones).
    """

    config: QuantConfig
    precision: Precision
    measured: bool = False
    unusable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    freed: Collection[int] = ()
    selection: Sequence[int] | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    at_largest: Callable[[Sequence[LayerInfo]], Mapping[str, LayerInfo]] = lambda infos: {}
    smoothing: Mapping[int, object] = dataclasses.field(default_factory=dict)
    merge: Callable[[tuple[int, ...]], bool] = lambda indices: False
    extra_inputs: list[tuple[str, int | tuple[int, ...]]] = dataclasses.field(default_factory=list)

    @property
    def kernels(self) -> Provider:
        """The provider of the graph's format on its device."""
        return provider_of(self.precision.format, self.device)

    def has_kernel(self, op: str, weight: Sequence[int] = ()) -> bool:
        """Whether there is a kernel for a fused ``op``; ``weight``: the shape of its weight, if that matters."""
        reason = self.kernels.lacks(op, self.precision.format, self.device, weight)
        if reason is not None:
            _log.debug("%s is not fused: %s", op, reason)
        return reason is None

    def threshold(self, kind: str) -> tuple[float, str]:
        """The density in FLOPs per byte below which a layer of this kind stays in float, and what that is called."""
        name = f"{kind}_compute_density_threshold"
        given = getattr(self.config, name)
        if given is not None:
            return given, f"{name}={given:g}"
        if self.measures_speed:
            return 0.0, "none"
        density = self.kernels.least_density(kind)
        return density, f"{density:g}, the {name} for {self.kernels.devices}"

    @property
    def measures_speed(self) -> bool:
        """Whether layers are selected by measured times, and by their compute density only where a threshold is set."""
        return self.kernels.times_layers and self.config.selection != "density"

    @property
    def in_regions(self) -> bool:
        """Whether what the graph does more than once is to be compiled once."""
        asked = self.config.regional_compilation
        return self.kernels.compiles_regions if asked == "auto" else bool(asked)

    @property
    def saturates(self) -> bool:
        """Whether converting to the activations' dtype limits them."""
        return self.kernels.saturates(self.precision.format)


def is_selected(info: LayerInfo, context: PassContext) -> bool:
    """Whether to rewrite this layer."""
    if info.index is None:
        return False
    return info.quantized if context.selection is None else info.index in context.selection
