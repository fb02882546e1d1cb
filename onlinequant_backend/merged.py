"""Several linear weights as one, for linears that read the same tensor and so can be one product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .layers import Layer


class MergedWeight:
    """The 8-bit weights of ``layers`` in one tensor, into which each goes on being quantized on its own.

    Attributes:
        layers: whose weights these are, in order; their ``weight`` and ``weight_scale`` become views.
        weight: [sum of N, K].
        weight_scale: float32 [sum of N], or [1] where a weight has one scale: then the largest of the layers' serves
            all. Such scales are powers of two, so that laying a weight onto a larger one only moves its exponents.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        weights, scales = [], []
        for layer in layers:
            assert layer.weight is not None and layer.weight_scale is not None
            weights.append(layer.weight)
            scales.append(layer.weight_scale)
        self.layers = tuple(layers)
        self._shares_scale = layers[0].format.linear_per_tensor
        with torch.inference_mode(False), torch.no_grad():
            self.weight = torch.cat([weight.view(torch.uint8) for weight in weights]).view(weights[0].dtype)
            self.weight_scale = torch.stack(scales).amax(0) if self._shares_scale else torch.cat(scales)
            rows = [weight.shape[0] for weight in weights]
            for layer, scale, part in zip(layers, scales, self.weight.split(rows), strict=True):
                layer.weight, layer.merged = part, self
                if self._shares_scale:
                    layer.weight_scale = self.weight_scale
                    _rescale(part, scale, self.weight_scale)
        if not self._shares_scale:
            for layer, part in zip(layers, self.weight_scale.split(rows), strict=True):
                layer.weight_scale = part

    def least_scale(self) -> torch.Tensor | None:
        """The scale that a layer has to be quantized with unless it needs a larger one."""
        return self.weight_scale if self._shares_scale and math.isfinite(float(self.weight_scale)) else None

    def change_scale(self, layer: Layer, scale: torch.Tensor) -> None:
        """``layer`` is being quantized with this ``scale``: lay the others onto it as well."""
        if not self._shares_scale or torch.equal(scale, self.weight_scale):
            return
        for other in self.layers:
            if other is not layer:
                if math.isfinite(float(scale)) and math.isfinite(float(self.weight_scale)):
                    assert other.weight is not None
                    _rescale(other.weight, self.weight_scale, scale)
                else:
                    other.forget()


def _rescale(weight: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
    if not torch.equal(old, new):
        weight.copy_((weight.float() * (old / new)).to(weight.dtype))
