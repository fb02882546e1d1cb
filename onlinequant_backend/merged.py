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
        weight_scale: float32 [sum of N], or [1] where a weight has one scale: then the largest that a layer needs
            serves all, and is NaN while any of them is not finite. Such scales are powers of two, so that laying a
            weight onto another one only moves its exponents.
        shares_scale: whether there is one for all.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        weights, scales = [], []
        for layer in layers:
            assert layer.weight is not None and layer.weight_scale is not None
            weights.append(layer.weight)
            scales.append(layer.weight_scale)
        self.layers = tuple(layers)
        self.shares_scale = layers[0].format.linear_per_tensor
        rows = [weight.shape[0] for weight in weights]
        with torch.inference_mode(False), torch.no_grad():
            self.weight = torch.cat([weight.view(torch.uint8) for weight in weights]).view(weights[0].dtype)
            self.weight_scale = scales[0].clone() if self.shares_scale else torch.cat(scales)
            for layer, part in zip(layers, self.weight.split(rows), strict=True):
                layer.weight, layer.merged = part, self
            if not self.shares_scale:
                for layer, own in zip(layers, self.weight_scale.split(rows), strict=True):
                    layer.weight_scale = own
                return
            self._needed = {layer: float(scale) for layer, scale in zip(layers, scales, strict=True)}
            self._scale = self._largest()
            for layer, needed in self._needed.items():
                layer.weight_scale = self.weight_scale
                _rescale(layer, needed, self._scale)
            self._show()

    def lay(self, layer: Layer, needed: float) -> float:
        """The scale to quantize ``layer`` with, whose weight now needs at least this one; the others are laid onto it.

        Not finite for a weight that is not: then the output of all layers is not finite until it is repaired.
        """
        self._needed[layer] = needed
        scale = self._largest()
        for other in self.layers:
            if other is not layer:
                _rescale(other, self._scale, scale)
                if scale < self._scale:
                    other.forget()  # what it lost to the larger scale comes back only from its float weight
        self._scale = scale
        self._show()
        return scale if math.isfinite(needed) else needed

    def _largest(self) -> float:
        """The scale that all parts can be laid onto; zeros, whose scale is not finite, onto any."""
        return max((scale for scale in self._needed.values() if math.isfinite(scale)), default=1.0)

    def _show(self) -> None:
        self.weight_scale.fill_(self._scale if all(map(math.isfinite, self._needed.values())) else math.nan)


def _rescale(layer: Layer, old: float, new: float) -> None:
    weight = layer.weight
    assert weight is not None
    if old != new and math.isfinite(old):
        weight.copy_((weight.float() * (old / new)).to(weight.dtype))
