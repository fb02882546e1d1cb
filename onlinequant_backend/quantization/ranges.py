"""Observed activations -> frozen scales.

While a graph is observed, every candidate layer records the exact range of its inputs and, if ranges may be clipped,
histograms of them.
Freezing turns these into the scale and zero point of an affine 8-bit format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..cache.calibration_checks import LEAST_SCALE
from ..kernels.formats import Format

if TYPE_CHECKING:
    pass

# The number of values sampled for a histogram. Far fewer miss the tails, and then clipping does harm.
SAMPLES = 65536
BINS = 1024
# The share of the observed values that "percentile" clips, at both ends together.
_CLIPPED_SHARE = 1e-4
# The share of a floating-point format's headroom that values may use before the range is widened.
_SPARED = 0.01
# The shares of the observed range that "mse" tries, largest first; the error is flat enough for a coarse grid.
_CLIP_RATIOS = tuple(1 - step / 32 for step in range(29))


class ActivationRange:
    """The observed values of one tensor: their range and histograms.

    ``minimum``, ``maximum``, ``lowest_peak``: initial values.

    Attributes:
        histograms: for each call with a histogram, the share of values in each bin and the bins' centres, float32
            [BINS] both; undefined if the range is not finite.
    """

    def __init__(
        self, minimum: float | None = None, maximum: float | None = None, lowest_peak: float | None = None
    ) -> None:
        self.histograms: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Combined only on access: on a GPU that would take four more kernels per call.
        self._bounds: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._known: _Known | None = None
        if minimum is not None and maximum is not None:
            peak = max(-minimum, maximum) or math.inf
            self._known = _Known(minimum, maximum, peak if lowest_peak is None else lowest_peak)

    def update(self, x: torch.Tensor, with_histogram: bool = True) -> None:
        """Extend the range to ``x`` (any float dtype and shape) and keep its histogram; never synchronizes with a
        GPU."""
        low, high = torch.aminmax(x)
        self._bounds.append((low, high))
        if with_histogram:
            self.histograms.append(_histogram(x, low.float(), high.float()))

    def copied(self) -> ActivationRange:
        """An independent copy."""
        other = ActivationRange()
        other.histograms, other._bounds = list(self.histograms), list(self._bounds)
        other._known = self._known
        return other

    def joined(self, other: ActivationRange) -> ActivationRange:
        """The union of both ranges, without histograms."""
        both = self.copied()
        both.histograms.clear()
        parts = [known for known in (self._settled(), other._settled()) if known is not None]
        both._bounds, both._known = [], _Known.of(parts) if parts else None
        return both

    @property
    def is_empty(self) -> bool:
        """Whether no call has been observed."""
        return self._known is None and not self._bounds

    @property
    def minimum(self) -> float | None:
        """The exact minimum over all calls; None before the first."""
        known = self._settled()
        return None if known is None else known.minimum

    @property
    def maximum(self) -> float | None:
        """The exact maximum over all calls; None before the first."""
        known = self._settled()
        return None if known is None else known.maximum

    @property
    def lowest_peak(self) -> float:
        """The least, over all calls, of a call's largest magnitude; infinite before the first. Calls with only zeros do
        not count, since zeros are exact in any range."""
        known = self._settled()
        return math.inf if known is None else known.lowest_peak

    def _settled(self) -> _Known | None:
        if self._bounds:
            # Not kept on a GPU, where a few bytes keep a large block of memory allocated.
            lows, highs = (torch.stack(bounds).float().cpu() for bounds in zip(*self._bounds, strict=True))
            peaks = torch.maximum(-lows, highs)
            peaks[peaks == 0] = math.inf
            seen = [_Known(*call) for call in zip(lows.tolist(), highs.tolist(), peaks.tolist(), strict=True)]
            self._known = _Known.of(seen if self._known is None else [self._known, *seen])
            self._bounds.clear()
        return self._known

    def is_finite(self) -> bool:
        """Whether a call has been observed, and all values were finite."""
        known = self._settled()
        return known is not None and math.isfinite(known.minimum) and math.isfinite(known.maximum)


class _Known(NamedTuple):
    """The range of one or several calls; NaN if any value was NaN."""

    minimum: float
    maximum: float
    lowest_peak: float

    @classmethod
    def of(cls, parts: Sequence[_Known]) -> _Known:
        """The range of all calls together."""
        lows, highs, peaks = torch.tensor(parts, dtype=torch.float64, device="cpu").unbind(1)
        return cls(float(lows.amin()), float(highs.amax()), float(peaks.amin()))


def _histogram(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Flattened in memory order, which needs no copy.
    flat = x.permute(*sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    while math.gcd(step, flat.numel()) > 1:  # otherwise it would visit only some of the channels
        step += 1
    flat = flat[::step].float()
    width = (high - low) / BINS
    # Bounds that are equal or not finite give NaN. torch.histc is slower, and needs the bounds as Python numbers.
    bins = ((flat - low) / width).nan_to_num_(0).clamp_(0, BINS - 1).long()
    counts = torch.zeros(BINS, dtype=torch.float32, device=x.device).scatter_add_(0, bins, torch.ones_like(flat))
    # The sample misses values that occur once in a million, which may matter for the image. The exact bounds are added
    # as two more values, so that clipping them has a cost.
    counts[:: BINS - 1].add_(1)
    centres = low + (torch.arange(BINS, dtype=torch.float32, device=x.device) + 0.5) * width
    return counts / (flat.numel() + 2), centres


def freeze(observed: ActivationRange, format: Format, method: str) -> torch.Tensor:
    """The float32 [3] ``qparams`` of ``ops.quantize``, on the CPU: 1 / scale, zero point and scale.

    Zero stays exactly representable, as zero padding needs. ``method`` "minmax" covers the whole range; "percentile"
    excludes the outermost values, a share of 10**-4; "mse" clips each end where the squared error of rounding and
    clipping together is least (Banner et al., "Post training 4-bit quantization of convolutional networks for
    rapid-deployment", 2019, equation 3, over the observed distribution).
    """
    return _qparams(*wanted(observed, format, method), format)


def wanted(observed: ActivationRange, format: Format, method: str) -> tuple[float, float]:
    """The range that ``freeze`` maps to a format's ``span``."""
    minimum, maximum = observed.minimum, observed.maximum
    assert minimum is not None and maximum is not None
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    if format.limits[0]:  # symmetric
        low, high = min(low, -high), max(high, -low)
    # A floating-point format rounds relative to each value, so clipping gains nothing.
    if method != "minmax" and observed.histograms and not format.activation.is_floating_point:
        shares, centres = (torch.cat(parts).cpu() for parts in zip(*observed.histograms, strict=True))
        clip = _clipped if method == "mse" else _percentile
        low, high = clip(shares, centres, low, high, format)
    return low * format.headroom, high * format.headroom


def widened(qparams: torch.Tensor, low: float, high: float, format: Format) -> torch.Tensor:
    """Quantization parameters that cover the range from ``low`` <= 0 to ``high`` >= 0 as well; ``qparams`` itself if it
    clips none of that range, or, in a floating-point format, if hardly any of the headroom is used."""
    inverse, zero_point, _ = values = qparams.tolist()
    lowest, highest = format.limits
    margin = -_SPARED * highest if format.activation.is_floating_point else 0.5
    if lowest + margin < low * inverse + zero_point and high * inverse + zero_point < highest - margin:
        return qparams
    known_low, known_high = _range(values, format)
    return _qparams(min(low, known_low), max(high, known_high), format)


def doubled(qparams: torch.Tensor, format: Format) -> torch.Tensor:
    """Quantization parameters of a range twice as wide."""
    low, high = _range(qparams.tolist(), format)
    return _qparams(2 * low, 2 * high, format)


def covered(qparams: Sequence[float], format: Format) -> tuple[float, float]:
    """The observed range from which ``freeze`` computes these quantization parameters."""
    low, high = _range(qparams, format)
    return low / format.headroom, high / format.headroom


def is_frozen_from(qparams: Sequence[float], observed: ActivationRange, format: Format, method: str) -> bool:
    """Whether ``freeze`` and ``widened`` can have computed these from such a range, with any histograms."""
    whole = _range(freeze(observed, format, "minmax").tolist(), format)
    method = "minmax" if format.activation.is_floating_point else method
    least = {"minmax": 1.0, "mse": _CLIP_RATIOS[-1]}.get(method, 0.0)
    # Rounding the zero point moves both ends, and values only slightly beyond the range do not widen it.
    margin = 2 * qparams[2]
    least -= _SPARED if format.activation.is_floating_point else 0
    return all(
        least * abs(end) - margin <= abs(of_part) <= abs(end) + margin
        for end, of_part in zip(whole, _range(qparams, format), strict=True)
    )


def _qparams(low: float, high: float, format: Format) -> torch.Tensor:
    lowest, highest = format.span
    # A layer whose inputs were all zeros still needs a positive scale.
    scale = max((high - low) / (highest - lowest), LEAST_SCALE)
    zero_point = 0 if format.limits[0] else round(min(max(lowest - low / scale, lowest), highest))
    return torch.tensor([1 / scale, zero_point, scale], dtype=torch.float32, device="cpu")


def _range(qparams: Sequence[float], format: Format) -> tuple[float, float]:
    _, zero_point, scale = qparams
    lowest, highest = format.span
    return min((lowest - zero_point) * scale, 0.0), max((highest - zero_point) * scale, 0.0)


def clipped_share(observed: ActivationRange, qparams: torch.Tensor, format: Format) -> float:
    """The largest share of values outside the range in any observed call; see ``clip_counting.clipped``."""
    inverse, zero_point, _ = qparams.tolist()
    lowest, highest = format.limits
    largest = 0.0
    for shares, centres in observed.histograms:
        q = centres * inverse + zero_point
        # Values within half a step round to a limit, and a bin extends an eighth of a step beyond its centre.
        clipped = (q > highest - 0.625) | (q < lowest + 0.625)
        largest = max(largest, float(shares[clipped].sum()))
    return min(largest, 1.0)


def _clipped(
    shares: torch.Tensor, centres: torch.Tensor, low: float, high: float, format: Format
) -> tuple[float, float]:
    """The range with the least squared error: searches upper ends, then lower ends; both at once if symmetric."""
    levels = format.span[1] - format.span[0]
    if format.limits[0]:
        ratio = min(_CLIP_RATIOS, key=lambda ratio: _squared_error(shares, centres, low * ratio, high * ratio, levels))
        return low * ratio, high * ratio
    high = min(_CLIP_RATIOS, key=lambda ratio: _squared_error(shares, centres, low, high * ratio, levels)) * high
    low = min(_CLIP_RATIOS, key=lambda ratio: _squared_error(shares, centres, low * ratio, high, levels)) * low
    return low, high


def _percentile(
    shares: torch.Tensor, centres: torch.Tensor, low: float, high: float, format: Format
) -> tuple[float, float]:
    """The range that excludes the share ``_CLIPPED_SHARE`` of the values, half of it at each end."""
    if format.limits[0]:
        centres = centres.abs()
    centres, order = centres.sort()
    below = shares[order].cumsum(0) / shares.sum()

    def value(share: float) -> float:
        return float(centres[min(int((below < share).sum()), len(centres) - 1)])

    if format.limits[0]:
        limit = value(1 - _CLIPPED_SHARE)
        return max(low, -limit), min(high, limit)
    lowest, highest = value(_CLIPPED_SHARE / 2), value(1 - _CLIPPED_SHARE / 2)
    return min(max(low, lowest), 0.0), max(min(high, highest), 0.0)


def _squared_error(shares: torch.Tensor, centres: torch.Tensor, low: float, high: float, levels: float) -> float:
    """Rounding errors are uniform over a step, so their square is step**2 / 12; clipping errors are distances
    squared."""
    step = (high - low) / levels
    beyond = centres - centres.clamp(low, high)
    return float((shares * torch.where(beyond == 0, step**2 / 12, beyond.square())).sum())
