"""The state of one layer in this process: the observed range of its inputs and the 8-bit copy of its weight."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch

from .. import fork_locks, ops
from ..cache.calibration_file import LayerCalibration
from ..graph.layer_info import Sensitivity
from ..kernels.formats import Format
from .input_range import InputRange
from .output_error import output_error
from .ranges import ActivationRange, clipped_share, is_frozen_from
from .smoothing import smoothing_factors
from .stored_weights import in_float
from .weight_copy import Copy

if TYPE_CHECKING:
    from ..graph.conv_geometry import ConvGeometry
    from .saved_weights import SavedCopy


# On a GPU a histogram takes about 15 small kernels, so a layer computes one in the first call and in every n-th.
_GPU_HISTOGRAMS = 8


class Layer(InputRange):
    """A conv or linear layer: one place at which a model uses a weight.

    ``first``: the layer of the same weight at its first place, whose copy may do for both.

    Attributes:
        geometry: of a convolution; like format, method and device, its state depends on it besides the weight.
        calls: the number of calls for which its input was observed.
        frozen: whether observing has ended and the input's quantization parameters are fixed.
        calibrated_for: fingerprint of the weights with which the input was observed; "" if they changed meanwhile.
        calibrated_in: identifies the operations of the graph in which it was observed, see ``keys``; "" for several.
        lock: of a model's first layer, held while any of its graphs is calibrated.
        sensitivity: the error of quantizing the layer, once measured.
        copy: the 8-bit copy of its weight.
    """

    def __init__(
        self,
        geometry: ConvGeometry | None,
        format: Format,
        method: str,
        device: torch.device | str = "cpu",
        first: Layer | None = None,
    ) -> None:
        super().__init__(format, method, torch.device(device))
        self.geometry = geometry
        self.calls = 0
        self.frozen = False
        self.calibrated_for = self.calibrated_in = ""
        self.lock = fork_locks.rlock()
        self.sensitivity: Sensitivity | None = None
        self.copy = Copy(geometry, format)
        self._first = first

    def observe(self, x: torch.Tensor, weight: torch.Tensor, turn: int = 0) -> None:
        """Record an input. The first one decides which channels are smoothed. ``turn``: distributes the layers'
        histograms over different calls."""
        # A floating-point format has the same relative error for small and large channels, and is never clipped.
        is_first, is_floating = self.observed.is_empty, self.format.activation.is_floating_point
        if is_first and not is_floating:
            with torch.inference_mode(False), torch.no_grad():
                self.smoothing = smoothing_factors(x, in_float(weight))
        every = 1 if self.device.type == "cpu" else _GPU_HISTOGRAMS
        is_due = is_first or (self.calls + turn) % every == 0
        self.observed.update(self._smoothed(x), with_histogram=is_due and not is_floating)

    def count_call(self, fingerprint: str, operations: str = "") -> None:
        """Count one observed call of a model whose weights have this fingerprint, in a graph of these operations."""
        if self.frozen:
            return
        self.calibrated_for = fingerprint if self.calls == 0 or self.calibrated_for == fingerprint else ""
        self.calibrated_in = operations if self.calls == 0 or self.calibrated_in == operations else ""
        self.calls += 1

    def freeze(self) -> None:
        """End observing and fix the range."""
        if not self.frozen and self.range_refusal() is None:
            self.clipped = max(self.clipped, clipped_share(self.observed, self.qparams, self.format))
            self.lowest_peak = min(self.lowest_peak, self.observed.lowest_peak)
        self.frozen = True

    def restore(self, saved: LayerCalibration, calls: int, calibrated_for: str, calibrated_in: str = "") -> None:
        """Load what another process observed."""
        self.observed = ActivationRange(saved.minimum, saved.maximum, saved.lowest_peak)
        with torch.inference_mode(False):
            if saved.qparams is not None:
                self._set_qparams(torch.tensor(saved.qparams, dtype=torch.float32, device="cpu"))
            self.smoothing = None
            if saved.smoothing is not None:
                shape = [1, -1, *[1] * (len(saved.weight_shape) - 2)] if self.geometry is not None else [-1]
                self.smoothing = torch.tensor(saved.smoothing, dtype=torch.float32, device=self.device).view(shape)
        self.sensitivity = None if saved.sensitivity is None else Sensitivity(*saved.sensitivity)
        self.clipped = saved.clipped
        self.lowest_peak = math.inf
        self.calls = calls
        self.calibrated_for, self.calibrated_in = calibrated_for, calibrated_in
        self.freeze()

    def fits(self, saved: LayerCalibration) -> bool:
        """Whether ``restore`` may load it: its scale and zero point must belong to its range."""
        if saved.qparams is None:
            return True
        observed = ActivationRange(saved.minimum, saved.maximum, saved.lowest_peak)
        return is_frozen_from(saved.qparams, observed, self.format, self.method)

    def go_back(self, observed: ActivationRange, smoothing: torch.Tensor | None) -> None:
        """Reset the observations to an earlier state, while observing."""
        self.observed, self.smoothing, self._ranged = observed, smoothing, False

    def start_over(self) -> None:
        """Discard the observations: the weight now belongs to another model."""
        self.observed = ActivationRange()
        self.sensitivity = self.smoothing = None
        self.clipped, self.lowest_peak, self.growth = 0.0, math.inf, 1.0
        self.calls = 0
        self.frozen = self._ranged = False

    def save(self, name: str, kind: str, weight_shape: tuple[int, ...]) -> LayerCalibration:
        """The calibration of a frozen layer, for ``restore``."""
        low, high = (math.nan if bound is None else bound for bound in (self.observed.minimum, self.observed.maximum))
        qparams = None if self.range_refusal() is not None else tuple(self.qparams.tolist())
        return LayerCalibration(
            name=name,
            kind=kind,
            weight_shape=weight_shape,
            minimum=low,
            maximum=high,
            qparams=qparams,
            sensitivity=None if self.sensitivity is None else dataclasses.astuple(self.sensitivity),
            lowest_peak=math.nan if qparams is None else min(self.lowest_peak, max(-low, high)),
            clipped=self.clipped,
            smoothing=None if self.smoothing is None else tuple(self.smoothing.flatten().tolist()),
        )

    def refresh(self, weight: torch.Tensor) -> bool:
        """Quantize ``weight`` unless its 8-bit copy is up to date; returns whether it had to."""
        if self.is_current(weight):
            return False
        self.requantize(weight)
        return True

    def is_current(self, weight: torch.Tensor) -> bool:
        """Whether the 8-bit copy was made of the current values of ``weight``."""
        self.choose_copy()
        return self.copy.is_current(weight)

    def requantize(self, weight: torch.Tensor, saved: SavedCopy | None = None) -> None:
        """Quantize ``weight``; see ``Copy.requantize``."""
        self.copy.requantize(weight, self.smoothing, saved)

    def choose_copy(self) -> None:
        """Share one copy between layers of one weight if their inputs are smoothed equally."""
        if self._first is None:
            return
        mine, other = self.smoothing, self._first.smoothing
        if mine is other or (mine is not None and other is not None and torch.equal(mine, other)):
            self.copy = self._first.copy
        elif self.copy is self._first.copy:
            self.copy = Copy(self.geometry, self.format)

    def parted(self, first: Layer | None = None) -> Layer:
        """A clone of the layer with a copy of its own, for another weight; see ``LayerRegistry.part``."""
        other = copy.copy(self)
        other.copy, other._first = Copy(self.geometry, self.format), first
        other.observed = self.observed.copied()
        other._qparams = None
        if self._qparams is not None and self._ranged:
            other._set_qparams(self._qparams)
        return other

    @property
    def kind(self) -> tuple[Any, ...]:
        """The properties that its state depends on besides the weight."""
        return self.geometry, self.format, self.method, self.device

    @property
    def weight(self) -> torch.Tensor | None:
        """The 8-bit copy, or None."""
        return self.copy.weight

    @property
    def weight_scale(self) -> torch.Tensor | None:
        """Its scales, or None."""
        return self.copy.weight_scale

    def refusal(self) -> str | None:
        """Why the layer cannot be quantized, or None."""
        if self.weight_scale is not None and not bool(torch.isfinite(self.weight_scale).all()):
            return "its weight is not finite"
        return self.range_refusal()

    def range_refusal(self) -> str | None:
        """Why the observed input cannot be quantized, or None."""
        if not self.observed.is_finite():
            return "its input was not finite while observing"
        if self.observed.minimum == 0 and self.observed.maximum == 0:
            return "its input was always zero while observing, so its range is not known"
        return None

    def restore_copy(self) -> None:
        """Make a copy that was released meanwhile again, from its source weight."""
        weight = self.copy.source
        if self.weight is None and weight is not None:
            self.requantize(weight)

    def quantized_output(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        """The layer's 8-bit output for float input ``x``, in the dtype of its float output ``y``."""
        if self.weight is None or self.weight_scale is None:
            return y
        qparams = self.qparams
        xq = ops.quantize(self._smoothed(x), qparams, self.format.activation, self.geometry is not None)
        if self.geometry is None:
            return ops.linear(xq, qparams, self.weight, self.weight_scale, bias, y.dtype)
        g = self.geometry
        geometry = (list(g.stride), list(g.padding), list(g.dilation))
        return ops.conv(xq, qparams, self.weight, self.weight_scale, bias, *geometry, y.dtype)

    def measure_sensitivity(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """Compare the layer's float output ``y`` with its 8-bit output for the same input."""
        if self.geometry is None:
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        self.sensitivity = output_error(lambda part: self.quantized_output(x[part], bias, y[part]), y)
