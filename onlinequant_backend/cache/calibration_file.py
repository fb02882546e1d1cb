"""A calibration as a file: what was observed of every layer, in the safetensors format, whole or not at all.

Whatever is read here may have been damaged or made up, so nothing of it is believed before it has been checked.

Own code: safetensors' writer puts the strings of the header in an order that differs from process to process, and a
checksum needs one; its reader of bytes drops them.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .calibration_checks import MAX_LAYERS, InvalidEntryError, check, short

# The files of an entry.
CALIBRATION_FILE, STATS_FILE = "calibration.safetensors", "quantization_stats.json"
AUTOTUNING_FILE = "autotuning.json"  # on GPUs
FORMAT, VERSION = "onlinequant-calibration", "4"
# Bytes of a file and of its header: far more than any model needs, far less than what would exhaust the memory.
MAX_BYTES, MAX_HEADER_BYTES = 64 * 2**20, 16 * 2**20
_METADATA = "__metadata__"  # where safetensors keeps strings


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
        given = _given(self)
        for column in _COLUMNS:
            object.__setattr__(self, column.name, column.read(_float32(column.write(self)), given))


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
        check(self)
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
        raise InvalidEntryError(f"its version is {short(metadata.get('version'))}; this onlinequant reads {VERSION!r}")
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
        raise InvalidEntryError(f"its metadata lacks something or has it in a wrong form: {short(error)}") from None
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
            f"it is no safetensors file, or a damaged one: its header claims {length} bytes, of {len(data)} in all and "
            f"{MAX_HEADER_BYTES} allowed"
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


class _Column(NamedTuple):
    """A field of LayerCalibration as a tensor of float32, one row a layer.

    Attributes:
        name: of the field and of the tensor.
        width: numbers of a layer; None where each layer has its own count, which the list of layers says.
        write: the numbers of a layer.
        read: the field's value from these and what ``_given`` says of the layer.
    """

    name: str
    width: int | None
    write: Callable[[LayerCalibration], Iterable[float]]
    read: Callable[[tuple[float, ...], bytes], Any]


def _number(name: str) -> _Column:
    return _Column(name, 1, lambda layer: [getattr(layer, name)], lambda values, given: values[0])


_NONE = (math.nan,) * 3
# In the order of the file. A new number is a line in LayerCalibration, anything else a row here too; and a new VERSION.
_COLUMNS = (
    *(_number(field.name) for field in dataclasses.fields(LayerCalibration) if field.type == "float"),
    _Column("qparams", 3, lambda layer: layer.qparams or _NONE, lambda values, given: values if given[0] else None),
    _Column(
        "sensitivity",
        3,
        lambda layer: (layer.sensitivity or _NONE)[:3],
        lambda values, given: (*values, bool(given[2])) if given[1] else None,
    ),
    _Column("smoothing", None, lambda layer: layer.smoothing or (), lambda values, given: values or None),
)


def _given(layer: LayerCalibration) -> bytes:
    """Whether a layer has ``qparams``, has ``sensitivity``, and whether this is of the model."""
    of_model = layer.sensitivity is not None and layer.sensitivity[3]
    return bytes([layer.qparams is not None, layer.sensitivity is not None, of_model])


def _tensors(layers: int, factors: int) -> dict[str, dict[str, Any]]:
    """What the header says of the tensors: the columns, and ``_given`` of all layers."""
    shapes = {
        column.name: [factors] if column.width is None else [layers] if column.width == 1 else [layers, column.width]
        for column in _COLUMNS
    }
    tensors: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, dtype, shape in (*((name, "F32", shape) for name, shape in shapes.items()), ("given", "U8", [layers, 3])):
        end = offset + math.prod(shape) * (4 if dtype == "F32" else 1)
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return tensors


def _check_tensors(header: Mapping[str, Any], body: bytes, layers: int, factors: int) -> None:
    expected = _tensors(layers, factors)
    for name in sorted({*header, *expected}):
        if header.get(name) != expected.get(name):
            has, needed = short(header.get(name)), expected.get(name)
            raise InvalidEntryError(f"its tensor {short(name)} is {has}, but has to be {needed}")
    end = expected["given"]["data_offsets"][1]
    if len(body) != end:
        raise InvalidEntryError(f"its tensors have {len(body)} bytes instead of {end}")


def _pack(layers: Sequence[LayerCalibration]) -> bytes:
    """The tensors' bytes: a column after the other, then what each layer has."""
    floats = [value for column in _COLUMNS for layer in layers for value in column.write(layer)]
    return struct.pack(f"<{len(floats)}f", *floats) + b"".join(map(_given, layers))


def _unpack(described: list[Any], body: bytes) -> Iterable[LayerCalibration]:
    given = body[len(body) - 3 * len(described) :]
    floats = iter(struct.unpack_from(f"<{(len(body) - len(given)) // 4}f", body))
    columns = {
        column.name: [
            tuple(itertools.islice(floats, factors if column.width is None else column.width))
            for _, _, _, factors in described
        ]
        for column in _COLUMNS
    }
    for index, (name, kind, shape, _) in enumerate(described):
        flags = given[3 * index : 3 * index + 3]
        fields = {column.name: column.read(columns[column.name][index], flags) for column in _COLUMNS}
        yield LayerCalibration(name=name, kind=kind, weight_shape=tuple(shape), **fields)


def _float32(values: Iterable[float]) -> tuple[float, ...]:
    """The nearest float32 values; every NaN becomes the same."""
    return tuple(math.nan if math.isnan(value) else value for value in array.array("f", values))
