"""A calibration as a file: what was observed of every layer, in the safetensors format, whole or not at all.

Whatever is read here may have been damaged or made up, so nothing of it is believed before it has been checked.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any

# The files of an entry.
CALIBRATION_FILE, STATS_FILE = "calibration.safetensors", "quantization_stats.json"
AUTOTUNING_FILE = "autotuning.json"  # on GPUs
FORMAT, VERSION = "onlinequant-calibration", "4"
# Bytes of a file and of its header: far more than any model needs, far less than what would exhaust the memory.
MAX_BYTES, MAX_HEADER_BYTES = 64 * 2**20, 16 * 2**20
MAX_LAYERS, MAX_CHARACTERS, MAX_ABOUT = 100_000, 500, 100
# Of smoothing: the channel that is shrunk by it is 2**48 times as large as the others.
LEAST_FACTOR = 2.0**-24
# The scale of a layer that has seen next to nothing but zeros.
LEAST_SCALE = 1e-30
# Of an observed range: what clipping a share of 10**-4 may leave.
_LEAST_PART = 2.0**-16
_KINDS = ("conv", "linear")
_NONE = (math.nan,) * 3
_METADATA = "__metadata__"  # where safetensors keeps strings


class InvalidEntryError(ValueError):
    """Data that is no whole calibration of this version, or a calibration that cannot be one."""


@dataclasses.dataclass(frozen=True)
class LayerCalibration:
    """What was observed of one layer. Floats are rounded to float32, so that a file gives back what it was given.

    Attributes:
        name: fully qualified name of the layer in its model; only ever compared.
        kind: "conv" or "linear".
        weight_shape: shape of its weight.
        minimum, maximum: range of its input; may be infinite or NaN, and then the layer stays in float.
        qparams: 1 / scale, zero point and scale of its input; None where the range rules 8 bit out.
        sensitivity: relative, mean absolute and mean squared error that it causes in 8 bit, and whether these are the
            model's output's instead of its own; None if not measured.
        lowest_peak: the largest magnitude of the call in which that was least; NaN where the range rules 8 bit out.
        clipped: the largest share of an observed input's values that lie beyond the quantized range.
        smoothing: a factor for each channel of its input, a power of two that is 1 for half of them at least; None for
            no smoothing.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    minimum: float
    maximum: float
    qparams: tuple[float, float, float] | None
    sensitivity: tuple[float, float, float, bool] | None
    lowest_peak: float = math.nan
    clipped: float = 0
    smoothing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("minimum", "maximum", "lowest_peak", "clipped"):
            object.__setattr__(self, name, _float32([getattr(self, name)])[0])
        for name in ("qparams", "smoothing"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _float32(getattr(self, name)))
        if self.sensitivity is not None:
            *errors, of_model = self.sensitivity
            object.__setattr__(self, "sensitivity", (*_float32(errors), of_model))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was observed of a model.

    Attributes:
        model: its class name.
        calls: observed calls.
        layers: its layers.
        about: where it was made, for people to read: torch, device, created and the like.
    """

    model: str
    calls: int
    layers: tuple[LayerCalibration, ...]
    about: Mapping[str, str]

    def to_bytes(self, key: str) -> bytes:
        """The file's content: equal calibrations and keys (64 hex digits) give equal bytes.

        Raises InvalidEntryError for a value that ``from_bytes`` would refuse.
        """
        _check(self)
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise InvalidEntryError(f"its key is {key!r}, which is not 64 lower-case hex digits")
        about = {
            "model": self.model,
            "calls": self.calls,
            "layers": [
                [layer.name, layer.kind, layer.weight_shape, len(layer.smoothing or ())] for layer in self.layers
            ],
            "about": self.about,
        }
        body = _pack(self.layers)
        metadata = {"format": FORMAT, "version": VERSION, "key": key, "calibration": _dumps(about), "sha256": ""}
        sizes = len(self.layers), sum(len(layer.smoothing or ()) for layer in self.layers)
        # Over everything: the header as it is without the digest, and the tensors.
        digest = hashlib.sha256(_header(metadata, *sizes) + body).hexdigest()
        header = _header({**metadata, "sha256": digest}, *sizes)
        if len(header) > MAX_HEADER_BYTES or len(header) + len(body) > MAX_BYTES:
            raise InvalidEntryError("its layers have too many or too long names for a file")
        return header + body

    @classmethod
    def from_bytes(cls, data: bytes, key_prefix: str) -> Calibration:
        """The reverse of ``to_bytes``; raises InvalidEntryError saying what is wrong.

        ``key_prefix``: what the file's key has to begin with.
        """
        key, calibration = decode(data)
        if not key.startswith(key_prefix):
            raise InvalidEntryError(f"it belongs to the key {key}, which does not begin with {key_prefix}")
        return calibration


def decode(data: bytes) -> tuple[str, Calibration]:
    """The key of a file and its calibration; raises InvalidEntryError saying what is wrong."""
    try:
        return _decode(data)
    except RecursionError:
        raise InvalidEntryError("its JSON is nested too deeply") from None


def _decode(data: bytes) -> tuple[str, Calibration]:
    header, body = _split(data)
    metadata = header.pop(_METADATA, None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InvalidEntryError("it is not a calibration of onlinequant")
    if metadata.get("version") != VERSION:
        raise InvalidEntryError(f"its version is {_short(metadata.get('version'))}; this onlinequant reads {VERSION!r}")
    key, about = metadata.get("key"), parse_object(metadata.get("calibration"), "its metadata")
    if not isinstance(key, str):
        raise InvalidEntryError("it has no key")
    described = about.get("layers")
    if not isinstance(described, list) or len(described) > MAX_LAYERS:
        raise InvalidEntryError(f"it does not list its layers, at most {MAX_LAYERS}")
    try:
        factors = sum(int(layer[3]) for layer in described)
    except (IndexError, KeyError, TypeError, ValueError, OverflowError):
        raise InvalidEntryError("its list of layers is in a wrong form") from None
    _check_tensors(header, body, len(described), factors)
    try:
        calibration = Calibration(about["model"], about["calls"], tuple(_unpack(described, body)), about["about"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidEntryError(f"its metadata lacks something or has it in a wrong form: {_short(error)}") from None
    # This checks every value, and with the digest every bit: there is one way only to write a calibration.
    if calibration.to_bytes(key) != data:
        raise InvalidEntryError("its checksum is wrong: it was damaged or changed")
    return key, calibration


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The parsed header and the tensors' bytes of a safetensors file."""
    if len(data) > MAX_BYTES:
        raise InvalidEntryError(f"its {len(data)} bytes are more than the {MAX_BYTES} allowed")
    if len(data) < 8:
        raise InvalidEntryError(f"its {len(data)} bytes are no safetensors file")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(len(data) - 8, MAX_HEADER_BYTES):
        raise InvalidEntryError(
            f"its header claims {length} bytes, of {len(data)} in all and {MAX_HEADER_BYTES} allowed"
        )
    return parse_object(data[8 : 8 + length], "its header"), data[8 + length :]


def parse_object(text: Any, what: str) -> dict[str, Any]:
    """The JSON object ``text``, a string or bytes; raises InvalidEntryError naming ``what`` for anything else."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEntryError(f"{what} is not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise InvalidEntryError(f"{what} is not a JSON object")
    return value


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def _header(metadata: Mapping[str, str], layers: int, factors: int) -> bytes:
    """Length and header of a file with ``layers`` layers, padded so that the tensors are aligned.

    ``factors``: how many of smoothing all of them have.
    """
    text = _dumps({_METADATA: metadata, **_tensors(layers, factors)}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _tensors(layers: int, factors: int) -> dict[str, dict[str, Any]]:
    """What the header says of the tensors. ``given``: whether a layer has ``qparams``, has
    ``sensitivity``, and whether this is of the model."""
    tensors: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, dtype, shape in (
        ("minimum", "F32", [layers]),
        ("maximum", "F32", [layers]),
        ("lowest_peak", "F32", [layers]),
        ("clipped", "F32", [layers]),
        ("qparams", "F32", [layers, 3]),
        ("sensitivity", "F32", [layers, 3]),
        ("smoothing", "F32", [factors]),
        ("given", "U8", [layers, 3]),
    ):
        end = offset + math.prod(shape) * (4 if dtype == "F32" else 1)
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return tensors


def _check_tensors(header: Mapping[str, Any], body: bytes, layers: int, factors: int) -> None:
    expected = _tensors(layers, factors)
    for name in sorted({*header, *expected}):
        if header.get(name) != expected.get(name):
            has, needed = _short(header.get(name)), expected.get(name)
            raise InvalidEntryError(f"its tensor {_short(name)} is {has}, but has to be {needed}")
    end = expected["given"]["data_offsets"][1]
    if len(body) != end:
        raise InvalidEntryError(f"its tensors have {len(body)} bytes instead of {end}")


def _pack(layers: Iterable[LayerCalibration]) -> bytes:
    layers = tuple(layers)
    floats = [layer.minimum for layer in layers]
    floats += [layer.maximum for layer in layers]
    floats += [layer.lowest_peak for layer in layers]
    floats += [layer.clipped for layer in layers]
    floats += [value for layer in layers for value in layer.qparams or _NONE]
    floats += [value for layer in layers for value in (layer.sensitivity or _NONE)[:3]]
    floats += [value for layer in layers for value in layer.smoothing or ()]
    given = b"".join(map(_given, layers))
    return struct.pack(f"<{len(floats)}f", *floats) + given


def _given(layer: LayerCalibration) -> bytes:
    of_model = layer.sensitivity is not None and layer.sensitivity[3]
    return bytes([layer.qparams is not None, layer.sensitivity is not None, of_model])


def _unpack(described: list[Any], body: bytes) -> Iterable[LayerCalibration]:
    count = len(described)
    end = len(body) - 3 * count
    floats, given = struct.unpack_from(f"<{end // 4}f", body), body[end:]
    end = 10 * count
    for index, (name, kind, shape, factors) in enumerate(described):
        minimum, maximum, lowest_peak, clipped = floats[index : 4 * count : count]
        qparams, errors = (floats[start : start + 3] for start in (4 * count + 3 * index, 7 * count + 3 * index))
        has_qparams, has_errors, of_model = map(bool, given[3 * index : 3 * index + 3])
        smoothing = tuple(floats[end : end + factors]) or None
        end += factors
        yield LayerCalibration(
            name=name,
            kind=kind,
            weight_shape=tuple(shape),
            minimum=minimum,
            maximum=maximum,
            qparams=qparams if has_qparams else None,
            sensitivity=(*errors, of_model) if has_errors else None,
            lowest_peak=lowest_peak,
            clipped=clipped,
            smoothing=smoothing,
        )


def _float32(values: Iterable[float]) -> tuple[float, ...]:
    """The nearest float32 values; every NaN becomes the same."""
    return tuple(math.nan if math.isnan(value) else value for value in array.array("f", values))


def _check(calibration: Calibration) -> None:
    _check_text("the model's name", calibration.model)
    if type(calibration.calls) is not int or not 0 <= calibration.calls < 2**53:
        raise InvalidEntryError(f"its number of calls is {_short(calibration.calls)}")
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
        raise InvalidEntryError(f"{layer.name} is of kind {_short(layer.kind)}, which is none of {_KINDS}")
    if len(layer.weight_shape) > 8 or not all(type(size) is int and 0 < size < 2**53 for size in layer.weight_shape):
        raise InvalidEntryError(f"the weight of {layer.name} has the shape {_short(layer.weight_shape)}")
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
        raise InvalidEntryError(f"{what} is {_short(value)}, not a text")
    if len(value) > MAX_CHARACTERS or not value.isprintable():
        raise InvalidEntryError(f"{what} is longer than {MAX_CHARACTERS} characters or has some that cannot be printed")


def _short(value: object) -> str:
    """``value`` for a message: what a file claims may be of any length."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
