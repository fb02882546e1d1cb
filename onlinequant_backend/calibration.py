"""Observed activations -> frozen scales.

While a graph is observed, every candidate layer keeps the exact range of its inputs and a small sample of their values.
Freezing turns these into the scale and zero point of an affine 8-bit format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .weights import Layer

# Values kept of each observed input: enough to see where clipping pays, little enough to cost nothing.
SAMPLES_PER_CALL = 2048
SAMPLES_SEARCHED = 16384
# Shares of the observed range that clipping tries, largest first; the error is flat enough for a coarse grid.
_CLIP_RATIOS = tuple(1 - step / 32 for step in range(29))


@dataclasses.dataclass
class ActivationRange:
    """What has been seen of one tensor: ``minimum`` and ``maximum`` (0-d float32), and samples (1-d float32)."""

    minimum: torch.Tensor | None = None
    maximum: torch.Tensor | None = None
    samples: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def update(self, x: torch.Tensor) -> None:
        """Widen the range by ``x`` (any float dtype and shape) and remember a few of its values."""
        low, high = (bound.float() for bound in torch.aminmax(x))
        self.minimum = low if self.minimum is None else torch.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else torch.maximum(self.maximum, high)
        self.samples.append(_sample(x))

    def is_finite(self) -> bool:
        """Whether anything has been seen, and nothing but finite numbers."""
        if self.minimum is None or self.maximum is None:
            return False
        return bool(torch.isfinite(self.minimum) & torch.isfinite(self.maximum))


def _sample(x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1) if x.is_contiguous() else x.permute(*_memory_order(x)).reshape(-1)
    # An odd stride visits every channel, whatever the layout.
    step = max(1, flat.numel() // SAMPLES_PER_CALL) | 1
    return flat[::step].float()


def _memory_order(x: torch.Tensor) -> list[int]:
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def freeze(observed: ActivationRange, bits: int, method: str) -> torch.Tensor:
    """The float32 [3] ``qparams`` of ``ops.quantize``: 1 / scale, zero point and scale.

    Zero stays exactly representable, as zero padding needs. ``method`` "minmax" covers the whole range, "mse" clips
    each end where the quantization error on the samples is least (Banner et al., "Post training 4-bit quantization
    of convolutional networks for rapid-deployment", 2019, find that point analytically; here it is searched).
    """
    assert observed.minimum is not None and observed.maximum is not None
    low, high = observed.minimum.clamp(max=0), observed.maximum.clamp(min=0)
    if method == "mse" and observed.samples:
        samples = torch.cat(observed.samples)
        samples = samples[:: 1 + samples.numel() // SAMPLES_SEARCHED]
        high = min(_CLIP_RATIOS, key=lambda ratio: _squared_error(samples, low, high * ratio, bits)) * high
        low = min(_CLIP_RATIOS, key=lambda ratio: _squared_error(samples, low * ratio, high, bits)) * low
    return _qparams(low, high, bits)


def _qparams(low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    levels = 2**bits - 1
    # A layer that only ever saw zeros still needs a scale that is positive.
    scale = ((high - low) / levels).clamp(min=torch.finfo(torch.float32).tiny * 2**20)
    zero_point = torch.round(-low / scale).clamp(0, levels)
    return torch.stack([1 / scale, zero_point, scale])


def _squared_error(samples: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> float:
    inverse, zero_point, scale = _qparams(low, high, bits)
    q = torch.clamp(torch.round(samples * inverse + zero_point), 0, 2**bits - 1)
    return float(((q - zero_point) * scale - samples).square().mean())


@dataclasses.dataclass
class Observation:
    """What one call of an observed graph feeds: the layers by index, and how far to look.

    Attributes:
        layers: state of each observed layer.
        measure: whether to compare each layer's float output with its 8-bit output.
        probe: index of the one layer whose 8-bit output is handed on in place of its float output, or None.
    """

    layers: Sequence[Layer]
    measure: bool = False
    probe: int | None = None
    _last: tuple[torch.Tensor, ActivationRange] | None = None

    def see(self, index: int, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Take note of one layer's input ``x`` and output ``y``; returns ``y``, or its 8-bit twin when probing."""
        layer = self.layers[index]
        if self.probe is not None:
            return layer.quantized_output(x, bias, y) if index == self.probe else y
        if self._last is not None and self._last[0] is x and layer.observed.minimum is None:
            layer.observed = self._last[1]  # q, k and v read one tensor: from now on they share one range
        if not (self._last is not None and self._last[0] is x and layer.observed is self._last[1]):
            layer.observed.update(x)
            self._last = (x, layer.observed)
        if self.measure and layer.observed.is_finite():
            layer.measure_sensitivity(x, bias, y)
        return y


def observe(
    observation: Observation, index: int, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The node that ``passes.insert_observers`` puts behind a layer; see ``Observation.see``."""
    return observation.see(index, x, y, bias)
