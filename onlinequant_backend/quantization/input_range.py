"""The range of a layer's input: fixed at the end of observing, and adapted when later inputs do not fit it."""

from __future__ import annotations

import math

import torch

from ..kernels.clip_counting import FEW, FEWEST_STEPS, Seen, has_drifted
from ..kernels.formats import NOT_FINITE, Format
from .ranges import ActivationRange, clipped_share, covered, doubled, freeze, wanted, widened
from .weight_copy import Generation, copies_lock, read_elsewhere

# The margin beyond new values when a range is widened: later values, such as those of the next seed or time step, are a
# little larger, and each widening costs a float call. The maximum of few values varies more.
_SPARE, _SPARE_OF_FEW = 1.125, 1.25


class InputRange:
    """The range of a layer's input, as quantization parameters in a tensor that compiled graphs hold.

    Attributes:
        format, method, device: what the range depends on besides the observed values.
        observed: the observed values.
        smoothing: factors by which the channels of the input are multiplied before they are quantized, and those of the
            weight divided; None for no smoothing. See ``smoothing_factors``.
        clipped: the largest share of an observed call's input that the frozen range clips.
        lowest_peak: the lowest peak, the largest magnitude of a call's input, over observed calls and over later ones
            that were accepted; see ``ActivationRange.lowest_peak``.
        growth: the factor by which the range was widened since it was frozen; 1 for no change, less than 1 if narrowed.
    """

    def __init__(self, format: Format, method: str, device: torch.device) -> None:
        self.format = format
        self.method = method
        self.device = device
        self.observed = ActivationRange()
        self.smoothing: torch.Tensor | None = None
        self.clipped = 0.0
        self.lowest_peak = math.inf
        self.growth = 1.0
        self._qparams: torch.Tensor | None = None
        self._values = (0.0, 0.0, 0.0)  # of _qparams
        self._ranged = False  # whether _qparams come from the observed range

    @property
    def qparams(self) -> torch.Tensor:
        """The input's quantization parameters (``ops.quantize``), computed from the observed range at the first use."""
        if self._qparams is None or not self._ranged:
            with torch.inference_mode(False), torch.no_grad():
                self._set_qparams(freeze(self.observed, self.format, self.method))
        assert self._qparams is not None
        return self._qparams

    def _set_qparams(self, qparams: torch.Tensor) -> None:
        # In place, since compiled graphs hold the tensor, unless a call is reading it.
        with copies_lock:
            if any(self._values):  # else no call has read them yet
                Generation.number += 1
            if self._qparams is None or any(layer is self for layer in read_elsewhere()):
                self._qparams = self._new_qparams()
            self._qparams.copy_(qparams)
            inverse, zero_point, scale = qparams.tolist()
            self._values = inverse, zero_point, scale
            self._ranged = True

    def _new_qparams(self) -> torch.Tensor:
        # cuBLAS requires the address of the scale, the last of the three, to be a multiple of 16 bytes.
        return torch.empty(5, dtype=torch.float32, device=self.device)[2:]

    def make_room(self) -> None:
        """Allocate the memory that freezing needs."""
        if self._qparams is None:
            with torch.inference_mode(False):
                self._qparams = self._new_qparams()

    def _smoothed(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.smoothing is None else x * self.smoothing

    def has_drifted(self, seen: Seen, is_in_doubt: bool = False) -> bool:
        """Whether inputs exceed the range, or use only a small part of it; see ``clip_counting.has_drifted``."""
        return has_drifted(seen, self.clipped, is_in_doubt) or self._is_lost(self._peak(seen))

    def is_coarse(self, seen: Seen) -> bool:
        """Whether the range is too coarse for the inputs with these counts."""
        return self._is_coarse_at(self._peak(seen))

    def is_finite(self, seen: Seen) -> bool:
        """Whether all values with these counts were finite: otherwise no range fits them."""
        not_finite = NOT_FINITE[self.format.activation]
        return not_finite not in (seen.lowest, seen.highest) and math.isfinite(seen.highest)

    def accept(self, seen: Seen) -> None:
        """Accept the inputs with these counts: repeating their call in float would change no range."""
        self.clipped = max(self.clipped, seen.clipped_in_doubt)
        self.lowest_peak = min(self.lowest_peak, self._peak(seen))

    def _peak(self, seen: Seen) -> float:
        """The largest magnitude possible for the values with these counts."""
        _, zero_point, scale = self._values
        return (max(seen.highest - zero_point, zero_point - seen.lowest) + self.format.step / 2) * scale

    def _is_lost(self, peak: float) -> bool:
        """Whether the range is too coarse for inputs with this peak, and the peak less than half of all earlier
        ones."""
        return self._is_coarse_at(peak) and peak < self.lowest_peak / 2

    def _is_coarse_at(self, peak: float) -> bool:
        return peak < FEWEST_STEPS * self.format.step * self._values[2]

    def refit(self, x: torch.Tensor, has_drifted: bool = True) -> bool:
        """Fit the range to ``x``, the layer's input in a call, and all earlier inputs, or to ``x`` alone if that range
        would be too coarse for it. Returns False if no range fits. ``has_drifted``: whether ``x`` did not fit; then a
        wider range gets a margin for the next input."""
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
            # Values that the method clips on purpose do not count as drift in later checks.
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
        """Improve the range for inputs with these counts: doubles it if values were clipped, else narrows it as far as
        they allow. Inputs that are all zeros change nothing, since they do not tell which range is right."""
        _, zero_point, scale = self._values
        with torch.inference_mode(False), torch.no_grad():
            if has_drifted(seen, self.clipped):
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
        # Widening rounds the range each time.
        self.observed = observed.joined(ActivationRange(*covered(qparams.tolist(), self.format)))
        self._set_qparams(qparams)
        self.growth *= self._values[2] / before
