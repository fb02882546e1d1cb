"""What a calibration must hold to be believed: checked before it is written and after it is read.

Own code: most of these values depend on each other, so that with pydantic each check would be as long as it is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .calibration_file import Calibration, LayerCalibration

MAX_LAYERS, MAX_CHARACTERS, MAX_ABOUT = 100_000, 500, 100
# Of smoothing: the channel that is shrunk by it is 2**48 times as large as the others.
LEAST_FACTOR = 2.0**-24
# The scale of a layer that has seen next to nothing but zeros.
LEAST_SCALE = 1e-30
# Of an observed range: what clipping a share of 10**-4 may leave.
_LEAST_PART = 2.0**-16
_KINDS = ("conv", "linear")


class InvalidEntryError(ValueError):
    """Data that is no whole calibration of this version, or a calibration that cannot be one."""


def check(calibration: Calibration) -> None:
    """Raise InvalidEntryError, saying what is wrong, for a calibration that no run can have made."""
    _check_text("the model's name", calibration.model)
    if type(calibration.calls) is not int or not 0 <= calibration.calls < 2**53:
        raise InvalidEntryError(f"its number of calls is {short(calibration.calls)}")
    if not isinstance(calibration.about, Mapping) or len(calibration.about) > MAX_ABOUT:
        raise InvalidEntryError(f"what it says about itself is not a mapping of at most {MAX_ABOUT} strings")
    for name, value in calibration.about.items():
        _check_text("a name of what it says about itself", name)
        _check_text(f"what it says about {name!r}", value, may_be_empty=True)
    if len(calibration.layers) > MAX_LAYERS:
        raise InvalidEntryError(f"its {len(calibration.layers)} layers are more than the {MAX_LAYERS} allowed")
    for layer in calibration.layers:
        _check_layer(layer)


def _check_layer(layer: LayerCalibration) -> None:
    _check_text("a layer's name", layer.name)
    if layer.kind not in _KINDS:
        raise InvalidEntryError(f"{layer.name} is of kind {short(layer.kind)}, which is none of {_KINDS}")
    if len(layer.weight_shape) > 8 or not all(type(size) is int and 0 < size < 2**53 for size in layer.weight_shape):
        raise InvalidEntryError(f"the weight of {layer.name} has the shape {short(layer.weight_shape)}")
    low, high = layer.minimum, layer.maximum
    if low > high:
        raise InvalidEntryError(f"the range of {layer.name} begins at {low} and ends at {high}")
    has_range = math.isfinite(low) and math.isfinite(high) and (low, high) != (0, 0)
    if layer.qparams is None:
        if has_range:
            raise InvalidEntryError(f"{layer.name} has the range [{low}, {high}] and no scale")
    elif not has_range:
        raise InvalidEntryError(f"{layer.name} has the range [{low}, {high}] and a scale")
    else:
        _check_qparams(layer.name, min(low, 0.0), max(high, 0.0), *layer.qparams)
        if not 0 < layer.lowest_peak <= max(-low, high):
            raise InvalidEntryError(f"{layer.name} has the range [{low}, {high}] and a call of {layer.lowest_peak}")
    if not 0 <= layer.clipped <= 1:
        raise InvalidEntryError(f"{layer.name} has clipped a share of {layer.clipped}")
    if layer.smoothing is not None:
        if len(layer.weight_shape) < 2 or len(layer.smoothing) != layer.weight_shape[1]:
            raise InvalidEntryError(f"{layer.name} has {len(layer.smoothing)} factors of smoothing")
        if not all(0 < factor <= 1 for factor in layer.smoothing):
            raise InvalidEntryError(f"{layer.name} has factors of smoothing that are not in (0, 1]")
        if not all(math.frexp(factor)[0] == 0.5 and factor >= LEAST_FACTOR for factor in layer.smoothing):
            raise InvalidEntryError(f"{layer.name} has factors of smoothing that are no powers of two or too small")
        if 2 * layer.smoothing.count(1.0) < len(layer.smoothing):
            raise InvalidEntryError(f"{layer.name} has more than half of its channels smoothed")
    if layer.sensitivity is not None and any(value < 0 for value in layer.sensitivity):
        raise InvalidEntryError(f"{layer.name} has negative errors: {layer.sensitivity}")


def _check_qparams(name: str, low: float, high: float, inverse: float, zero_point: float, scale: float) -> None:
    """Of a range that begins at ``low`` <= 0 and ends at ``high`` >= 0, in any of ``formats``."""
    # Both are rounded to float32, of 24 bits.
    if not (0 < scale < math.inf and abs(inverse * scale - 1) < 1e-6):
        raise InvalidEntryError(f"{name} has the scale {scale} and 1 / scale = {inverse}")
    if not (0 <= zero_point <= 254 and zero_point == int(zero_point)):
        raise InvalidEntryError(f"the zero point of {name} is {zero_point}, not a whole number in [0, 254]")
    largest = max(-low, high)
    begin, end = -zero_point * scale, (254 - zero_point) * scale
    # Beyond both ends there is a margin of a step, and a zero point is rounded; symmetric formats have none, and the
    # largest value at 126 or 224.
    fits = low - 2 * scale <= begin and end <= high + 2 * scale if zero_point else scale <= largest / 125
    if not (fits or scale < 1.01 * LEAST_SCALE) or end - begin < _LEAST_PART * largest:
        raise InvalidEntryError(
            f"{name} has the range [{low}, {high}], but the scale {scale} and the zero point {zero_point}"
        )


def _check_text(what: str, value: object, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or may_be_empty):
        raise InvalidEntryError(f"{what} is {short(value)}, not a text")
    if len(value) > MAX_CHARACTERS or not value.isprintable():
        raise InvalidEntryError(f"{what} is longer than {MAX_CHARACTERS} characters or has some that cannot be printed")


def short(value: object) -> str:
    """``value`` for a message: what a file claims may be of any length."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
