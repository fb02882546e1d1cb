"""The state of one layer in this process: what was observed of its inputs, and the 8-bit copy that it runs on."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch

from onlinequant_backend.graph.layer_info import Sensitivity

from .. import fork_locks, ops
from ..cache.calibration_file import LayerCalibration
from ..kernels.clip_counting import FEW, FEWEST_STEPS, Seen, has_drifted
from ..kernels.formats import NOT_FINITE, Format
from .ranges import ActivationRange, clipped_share, covered, doubled, freeze, is_frozen_from, wanted, widened
from .smoothing import smoothing_factors
from .weight_copy import Copy, Generation, copies_lock, read_elsewhere

if TYPE_CHECKING:
    from ..graph.conv_geometry import ConvGeometry


# Values of outputs that are compared at a time, of one image at least: all of a video model's take more than its step.
_MOST_COMPARED = 2**26
# On a GPU a histogram is about 15 small kernels, so a layer has one made for the first and for one in so many calls.
_GPU_HISTOGRAMS = 8
# What a range that values have left is widened by beyond these: others, as those of the next seed or time step, will go
# a little farther, and each time is a call in float. The largest of few values varies more.
_SPARE, _SPARE_OF_FEW = 1.125, 1.25


class Layer:
    """A conv or linear layer: one place at which a model uses a weight.

    ``first``: the layer of the same weight at its first place, whose copy may do for both.

    Attributes:
        geometry, format, method, device: what its state depends on beside the weight.
        calls: how many calls its input was observed for.
        frozen: whether observing is over and the input's quantization parameters are fixed for good.
        calibrated_for: fingerprint of the weights with which the input was observed; "" where they changed meanwhile.
        calibrated_in: stands for what the graph computes in which that was, see ``keys``; "" where it was in several.
        lock: of a model's first layer, held while any of its graphs is calibrated.
        observed, sensitivity: what was seen.
        smoothing: what the channels of its input are multiplied by before they are quantized, and those of its weight
            divided by; None for nothing. See ``smoothing_factors``.
        clipped: the largest share of an observed call's input that the frozen range clips.
        lowest_peak: the least that the largest magnitude of an input has been, of observed calls and of those since
            which have been found to be as large as they should; see ``ActivationRange.lowest_peak``.
        growth: by how much the range was widened since it was frozen; 1 if it was not, less if it was narrowed.
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
        self.geometry = geometry
        self.format = format
        self.method = method
        self.device = torch.device(device)
        self.calls = 0
        self.frozen = False
        self.calibrated_for = self.calibrated_in = ""
        self.lock = fork_locks.rlock()
        self.observed = ActivationRange()
        self.sensitivity: Sensitivity | None = None
        self.smoothing: torch.Tensor | None = None
        self.clipped = 0.0
        self.lowest_peak = math.inf
        self.growth = 1.0
        self.copy = Copy(geometry, format)
        self._first = first
        self._qparams: torch.Tensor | None = None
        self._values = (0.0, 0.0, 0.0)  # of _qparams
        self._ranged = False  # whether _qparams are of what was observed

    @property
    def qparams(self) -> torch.Tensor:
        """The input's quantization parameters (``ops.quantize``), fixed from what was observed at the first use."""
        if self._qparams is None or not self._ranged:
            with torch.inference_mode(False), torch.no_grad():
                self._set_qparams(freeze(self.observed, self.format, self.method))
        assert self._qparams is not None
        return self._qparams

    def _set_qparams(self, qparams: torch.Tensor) -> None:
        # Into the same tensor as before, which compiled graphs were given, unless a call is reading it.
        with copies_lock:
            if any(self._values):  # else nobody has read them yet
                Generation.number += 1
            if self._qparams is None or any(layer is self for layer in read_elsewhere()):
                self._qparams = self._new_qparams()
            self._qparams.copy_(qparams)
            inverse, zero_point, scale = qparams.tolist()
            self._values = inverse, zero_point, scale
            self._ranged = True

    def _new_qparams(self) -> torch.Tensor:
        # cuBLAS wants the scale, the last of the three, at an address that is a multiple of 16 bytes.
        return torch.empty(5, dtype=torch.float32, device=self.device)[2:]

    def make_room(self) -> None:
        """Allocate what freezing will need."""
        if self._qparams is None:
            with torch.inference_mode(False):
                self._qparams = self._new_qparams()

    def observe(self, x: torch.Tensor, weight: torch.Tensor, turn: int = 0) -> None:
        """Take note of an input. The first one decides which channels are smoothed. ``turn``: tells layers apart whose
        histograms are not to be made all in one call."""
        # A floating format rounds small and large channels alike, and is never clipped.
        is_first, is_floating = self.observed.is_empty, self.format.activation.is_floating_point
        if is_first and not is_floating:
            with torch.inference_mode(False), torch.no_grad():
                self.smoothing = smoothing_factors(x, weight)
        every = 1 if self.device.type == "cpu" else _GPU_HISTOGRAMS
        is_due = is_first or (self.calls + turn) % every == 0
        self.observed.update(self._smoothed(x), with_histogram=is_due and not is_floating)

    def _smoothed(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.smoothing is None else x * self.smoothing

    def count_call(self, fingerprint: str, operations: str = "") -> None:
        """Count one observed call of a model whose weights have this fingerprint, in a graph of these operations."""
        if self.frozen:
            return
        self.calibrated_for = fingerprint if self.calls == 0 or self.calibrated_for == fingerprint else ""
        self.calibrated_in = operations if self.calls == 0 or self.calibrated_in == operations else ""
        self.calls += 1

    def freeze(self) -> None:
        """Observing is over; what was observed decides from now on."""
        if not self.frozen and self.range_refusal() is None:
            self.clipped = max(self.clipped, clipped_share(self.observed, self.qparams, self.format))
            self.lowest_peak = min(self.lowest_peak, self.observed.lowest_peak)
        self.frozen = True

    def has_drifted(self, seen: Seen, is_after_change: bool = False) -> bool:
        """Whether inputs have left the range, or use next to nothing of it; as for ``drift.has_drifted``."""
        return has_drifted(seen.clipped, self.clipped, is_after_change) or self._is_lost(self._peak(seen))

    def is_coarse(self, seen: Seen) -> bool:
        """Whether rounding shows in inputs of which this was stored."""
        return self._is_coarse_at(self._peak(seen))

    def is_finite(self, seen: Seen) -> bool:
        """Whether all values of which this was stored were numbers: else no range fits them."""
        not_finite = NOT_FINITE[self.format.activation]
        return not_finite not in (seen.lowest, seen.highest) and math.isfinite(seen.highest)

    def accept(self, seen: Seen) -> None:
        """Inputs of which this was seen in 8 bit are as they should: to do their call again would change no range."""
        self.clipped = max(self.clipped, seen.clipped)
        self.lowest_peak = min(self.lowest_peak, self._peak(seen))

    def _peak(self, seen: Seen) -> float:
        """The largest magnitude that the values may have had of which this was stored."""
        _, zero_point, scale = self._values
        return (max(seen.highest - zero_point, zero_point - seen.lowest) + self.format.step / 2) * scale

    def _is_lost(self, peak: float) -> bool:
        """Whether inputs of this largest magnitude are too coarse in this range, and less than half of all before."""
        return self._is_coarse_at(peak) and peak < self.lowest_peak / 2

    def _is_coarse_at(self, peak: float) -> bool:
        return peak < FEWEST_STEPS * self.format.step * self._values[2]

    def refit(self, x: torch.Tensor, has_drifted: bool = True) -> bool:
        """Have the range be right for ``x``, the layer's input of a call: as wide as that and all before need, or, if
        it would be lost in that, as wide as it needs alone. False if no range can. ``has_drifted``: whether it was not,
        and so may be too narrow for the next input, too."""
        with torch.inference_mode(False), torch.no_grad():
            seen = ActivationRange()
            seen.update(self._smoothed(x), with_histogram=not self.format.activation.is_floating_point)
            if not seen.is_finite():
                return False
            if self._is_lost(seen.lowest_peak):
                self._narrow(seen)
            else:
                self.lowest_peak = min(self.lowest_peak, seen.lowest_peak)
                needs_more = has_drifted and self._widened(seen) is not self.qparams
                needed = self._with_spare(seen, x.numel() < FEW) if needs_more else seen
                self._move(self._widened(needed), self.observed.joined(needed))
            # What is clipped on purpose is no drift the next time.
            self.clipped = max(self.clipped, clipped_share(seen, self.qparams, self.format))
            seen.histograms.clear()
        return True

    def _with_spare(self, seen: ActivationRange, is_of_few: bool) -> ActivationRange:
        low, high = wanted(seen, self.format, "minmax" if is_of_few else self.method)
        spare = max(_SPARE_OF_FEW if is_of_few else _SPARE, self.format.headroom) / self.format.headroom**2
        return ActivationRange(low * spare, high * spare)

    def _widened(self, seen: ActivationRange) -> torch.Tensor:
        return widened(self.qparams, *wanted(seen, self.format, self.method), self.format)

    def step(self, seen: Seen) -> None:
        """Have the range fit inputs better of which this was stored: twice as wide if some of it was clipped, else as
        wide as it needs. What is all zeros changes nothing, for who knows of what."""
        _, zero_point, scale = self._values
        with torch.inference_mode(False), torch.no_grad():
            if has_drifted(seen.clipped, self.clipped):
                self._move(doubled(self.qparams, self.format), self.observed)
            elif self._is_lost(self._peak(seen)) and (seen.lowest, seen.highest) != (zero_point, zero_point):
                half = self.format.step / 2
                low, high = seen.lowest - half - zero_point, seen.highest + half - zero_point
                self._narrow(ActivationRange(min(low, 0) * scale, max(high, 0) * scale))

    def _narrow(self, seen: ActivationRange) -> None:
        self._move(freeze(seen, self.format, self.method), seen)
        self.clipped, self.lowest_peak = 0.0, min(self.lowest_peak, seen.lowest_peak)

    def _move(self, qparams: torch.Tensor, observed: ActivationRange) -> None:
        before = self._values[2]
        # Ranges that were widened are rounded each time.
        self.observed = observed.joined(ActivationRange(*covered(qparams.tolist(), self.format)))
        self._set_qparams(qparams)
        self.growth *= self._values[2] / before

    def restore(self, saved: LayerCalibration, calls: int, calibrated_for: str, calibrated_in: str = "") -> None:
        """Take over what another process observed."""
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
        """Whether ``restore`` may take it: its scale and zero point are what its range gives."""
        if saved.qparams is None:
            return True
        observed = ActivationRange(saved.minimum, saved.maximum, saved.lowest_peak)
        return is_frozen_from(saved.qparams, observed, self.format, self.method)

    def go_back(self, observed: ActivationRange, smoothing: torch.Tensor | None) -> None:
        """Have seen no more than this, while observing."""
        self.observed, self.smoothing, self._ranged = observed, smoothing, False

    def start_over(self) -> None:
        """Forget what was observed: the weight now is another model's."""
        self.observed = ActivationRange()
        self.sensitivity = self.smoothing = None
        self.clipped, self.lowest_peak, self.growth = 0.0, math.inf, 1.0
        self.calls = 0
        self.frozen = self._ranged = False

    def save(self, name: str, kind: str, weight_shape: tuple[int, ...]) -> LayerCalibration:
        """What ``restore`` takes, of a frozen layer."""
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
        """Whether the 8-bit copy is that of ``weight`` as it is now."""
        self.choose_copy()
        return self.copy.is_current(weight)

    def requantize(self, weight: torch.Tensor) -> None:
        """Quantize ``weight``; see ``Copy.requantize``."""
        self.copy.requantize(weight, self.smoothing)

    def choose_copy(self) -> None:
        """Layers of one weight run on one copy where their inputs are smoothed alike."""
        if self._first is None:
            return
        mine, other = self.smoothing, self._first.smoothing
        if mine is other or (mine is not None and other is not None and torch.equal(mine, other)):
            self.copy = self._first.copy
        elif self.copy is self._first.copy:
            self.copy = Copy(self.geometry, self.format)

    def parted(self, first: Layer | None = None) -> Layer:
        """The same layer with a copy of its own, for another weight; see ``Registry.part``."""
        other = copy.copy(self)
        other.copy, other._first = Copy(self.geometry, self.format), first
        other.observed = self.observed.copied()
        other._qparams = None
        if self._qparams is not None and self._ranged:
            other._set_qparams(self._qparams)
        return other

    @property
    def kind(self) -> tuple[Any, ...]:
        """What its state depends on beside the weight."""
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
        """What rules 8 bit out, or None."""
        if self.weight_scale is not None and not bool(torch.isfinite(self.weight_scale).all()):
            return "its weight is not finite"
        return self.range_refusal()

    def range_refusal(self) -> str | None:
        """What was observed of the input that rules 8 bit out, or None."""
        if not self.observed.is_finite():
            return "its input was not finite while observing"
        if self.observed.minimum == 0 and self.observed.maximum == 0:
            return "its input was always zero while observing, so its range is not known"
        return None

    def restore_copy(self) -> None:
        """Make a copy that was released meanwhile again, of the weight that it was made of."""
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
        parts = min(len(y), math.ceil(y.numel() / _MOST_COMPARED))
        sums = []
        for x_part, y_part in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            error = self.quantized_output(x_part, bias, y_part).float() - y_part
            sums.append(torch.stack([error.abs().sum(), error.square().sum(), y_part.abs().sum(dtype=torch.float32)]))
        mae, mse, magnitude = (torch.stack(sums).sum(0, dtype=torch.float64) / y.numel()).tolist()
        self.sensitivity = Sensitivity(mae / max(magnitude, torch.finfo(torch.float32).tiny), mae, mse)
