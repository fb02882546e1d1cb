"""The input of a pass besides the graph: options, layer selection and device."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.fx as fx

from onlinequant_backend.config import QuantConfig
from onlinequant_backend.graph import AttentionInfo, LayerInfo
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.kernels.provider import Provider, provider_of

_log = logging.getLogger("onlinequant")
Info = LayerInfo | AttentionInfo


@dataclasses.dataclass
class PassContext:
    """The passes' input and the state that they share.

    Attributes:
        config, precision: the user's options, and the formats that they resolve to on the device.
        measured: whether the layers' sensitivities have been measured.
        unusable: by layer name, the reason found by observing why it cannot be quantized.
        freed: indices of the layers whose float weight was freed, so that they must be quantized.
        selection: indices of the layers to rewrite; None means all that are ``LayerInfo.quantized``.
        device: the device on which the graph runs.
        at_largest: each of these layers or attention, by name, at the largest size that its model was traced at.
        smoothing: by layer index, an identifier of the smoothing factors of its input, if it is smoothed.
        merge: merges the weights of several layers, by their indices; returns whether that was possible.
        values: what each node of the rewritten graph returns, with the strides that it has there.
        extra_inputs: inputs that rewriting appended, in order: (what, index of the layer or indices of merged ones).
    """

    config: QuantConfig
    precision: Precision
    measured: bool = False
    unusable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    freed: Collection[int] = ()
    selection: Sequence[int] | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    at_largest: Callable[[Sequence[Info]], Mapping[str, Info]] = lambda infos: {}
    smoothing: Mapping[int, object] = dataclasses.field(default_factory=dict)
    merge: Callable[[tuple[int, ...]], bool] = lambda indices: False
    values: Callable[[fx.GraphModule], Mapping[fx.Node, object]] = lambda graph_module: {}
    extra_inputs: list[tuple[str, int | tuple[int, ...]]] = dataclasses.field(default_factory=list)

    @property
    def kernels(self) -> Provider:
        """The provider of kernels for the graph's format on its device."""
        return provider_of(self.precision.format, self.device)

    def has_kernel(self, op: str, weight: Sequence[int] = ()) -> bool:
        """Whether a kernel exists for the fused ``op``; ``weight``: the shape of a layer's weight."""
        reason = self.kernels.lacks(op, self.precision.format, self.device, weight)
        if reason is not None:
            _log.debug("%s is not fused: %s", op, reason)
        return reason is None

    def threshold(self, kind: str) -> tuple[float, str]:
        """The density in FLOPs per byte below which a layer of this kind stays in float, and a description of it."""
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
        """Whether layers are selected by measured times, and by compute density only if a threshold is set."""
        return self.kernels.times_layers and self.config.selection != "density"

    @property
    def in_regions(self) -> bool:
        """Whether repeated regions of the graph are to be compiled once."""
        asked = self.config.regional_compilation
        return self.kernels.compiles_regions if asked == "auto" else bool(asked)

    @property
    def saturates(self) -> bool:
        """Whether converting to the activations' dtype saturates."""
        return self.kernels.saturates(self.precision.format)


def is_selected(info: LayerInfo, context: PassContext) -> bool:
    """Whether to rewrite this layer."""
    if info.index is None:
        return False
    return info.quantized if context.selection is None else info.index in context.selection
