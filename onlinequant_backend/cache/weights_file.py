"""8-bit weights as a file: a safetensors file whose tensors are read where they are, by a memory map.

The header is checked as a whole when it is read. The tensors are not, since they may be gigabytes: the header has a
checksum of each, and of the float weight that it was made of, for whoever uses it. What the checksums are is up to that
room, which has torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import mmap
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .atomic_files import opened
from .calibration_checks import MAX_CHARACTERS, MAX_LAYERS, InvalidEntryError, short
from .calibration_file import parse_object

WEIGHTS_FILE = "weights.safetensors"
_FORMAT, _VERSION = "onlinequant-weights", "1"
_MOST_HEADER_BYTES = 2**26
_DTYPES = ("I8", "F8_E4M3")
_DIGITS = 16


@dataclasses.dataclass(frozen=True)
class SavedWeight:
    """One 8-bit weight.

    Attributes:
        name: of its layer.
        dtype: of its values, as safetensors names it.
        shape: of the weight.
        scales: how many there are, of float32.
        source: 16 hex digits that identify the float weight and how it was quantized.
        checksum: 16 hex digits of values and scales.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scales: int
    source: str
    checksum: str

    @property
    def size(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """What a file has.

    Attributes:
        model: class name of the model.
        weights: by layer.
        values: the bytes of a layer's values, in the file.
        scales: the same of its scales.
    """

    model: str
    weights: Mapping[str, SavedWeight]
    values: Mapping[str, memoryview]
    scales: Mapping[str, memoryview]


def size_of(weights: Sequence[SavedWeight]) -> int:
    """The bytes of a file's tensors."""
    return sum(weight.size + 4 * weight.scales for weight in weights)


def write(
    file: BinaryIO,
    key: str,
    model: str,
    outline: Sequence[SavedWeight],
    made: Iterable[tuple[SavedWeight, memoryview, bytes]],
) -> None:
    """Write a file's content: each weight of ``made`` with the bytes of its values and of its scales.

    ``outline``: the same weights with any 16 digits for checksums, which are known only when a weight is made, so that
    one at a time needs memory. ``key``: 48 hex digits.
    """
    first = _header(key, model, outline)
    file.write(first)
    found, scales = [], []
    for weight, values, scale in made:
        file.write(values)
        found.append(weight)
        scales.append(scale)
    file.write(b"".join(scales))
    last = _header(key, model, found)
    if len(last) != len(first):
        raise ValueError("the weights are not those of the outline")
    file.seek(0)
    file.write(last)
    file.seek(0, 2)


def read(path: Path, key: str) -> WeightsFile:
    """The weights in a file; raises InvalidEntryError, saying what is wrong, for one that is damaged or of another key,
    and OSError if it cannot be read."""
    with opened(path) as file:
        # Copy-on-write: nothing writes, but torch warns of memory that cannot be written. A file is only ever replaced,
        # never changed, so that what is mapped stays.
        try:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except ValueError:
            raise InvalidEntryError("it is empty") from None
    model, weights, begin = _decoded(data, key)
    if len(data) != begin + size_of(weights):
        raise InvalidEntryError(f"it has {len(data)} bytes instead of {begin + size_of(weights)}")
    values, scales = {}, {}
    for weight in weights:
        values[weight.name] = data[begin : begin + weight.size]
        begin += weight.size
    for weight in weights:
        scales[weight.name] = data[begin : begin + 4 * weight.scales]
        begin += 4 * weight.scales
    return WeightsFile(model, {weight.name: weight for weight in weights}, values, scales)


def _decoded(data: memoryview, key: str) -> tuple[str, list[SavedWeight], int]:
    """The model, the weights and where the tensors begin."""
    length = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else _MOST_HEADER_BYTES + 1
    if length > min(len(data) - 8, _MOST_HEADER_BYTES):
        raise InvalidEntryError(f"its {len(data)} bytes are no safetensors file, or a part of one")
    header = bytes(data[: 8 + length])
    metadata = parse_object(header[8:], "its header").get("__metadata__")
    if not isinstance(metadata, dict) or (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
        raise InvalidEntryError(f"it is not of the format {_FORMAT} {_VERSION}")
    its_key = metadata.get("key")
    if not (isinstance(its_key, str) and re.fullmatch("[0-9a-f]{48}", its_key) and its_key.startswith(key)):
        raise InvalidEntryError(f"it belongs to the key {short(its_key)}, not to {key}")
    about = parse_object(metadata.get("weights"), "its metadata")
    try:
        model, weights = about["model"], [_checked(SavedWeight(**each)) for each in about["layers"]]
    except (KeyError, TypeError) as error:
        raise InvalidEntryError(f"its metadata has a wrong form: {short(error)}") from None
    if not isinstance(model, str) or not model.isprintable() or len(model) > MAX_CHARACTERS:
        raise InvalidEntryError("its model has no name")
    if len(weights) > MAX_LAYERS or len({weight.name for weight in weights}) < len(weights):
        raise InvalidEntryError("it lists a layer twice, or too many")
    # With the digest in it this checks every bit.
    if _header(its_key, model, weights) != header:
        raise InvalidEntryError("the checksum of its header is wrong: it was damaged or changed")
    return model, weights, len(header)


def _checked(weight: SavedWeight) -> SavedWeight:
    sizes = weight.shape
    if (
        not isinstance(sizes, list)
        or len(sizes) > 8
        or not all(type(size) is int and 0 < size < 2**40 for size in sizes)
    ):
        raise InvalidEntryError(f"a weight has the shape {short(sizes)}")
    digits = isinstance(weight.source, str) and isinstance(weight.checksum, str)
    if not digits or not re.fullmatch(f"[0-9a-f]{{{2 * _DIGITS}}}", weight.source + weight.checksum):
        raise InvalidEntryError("a weight has no checksums")
    if weight.dtype not in _DTYPES or type(weight.scales) is not int or not 0 < weight.scales < 2**40:
        raise InvalidEntryError(f"a weight is {short(weight)}")
    if not isinstance(weight.name, str) or len(weight.name) > MAX_CHARACTERS:
        raise InvalidEntryError("a weight has no name")
    return dataclasses.replace(weight, shape=tuple(sizes))


def _header(key: str, model: str, weights: Sequence[SavedWeight]) -> bytes:
    """The length and the header of a file, of a length that does not depend on the checksums."""
    about = json.dumps({"model": model, "layers": [dataclasses.asdict(weight) for weight in weights]}, sort_keys=True)
    metadata = {"format": _FORMAT, "version": _VERSION, "key": key, "weights": about, "sha256": "0" * 64}
    tensors = _tensors(weights)
    digest = hashlib.sha256(_dumped({"__metadata__": metadata, **tensors})).hexdigest()
    return _dumped({"__metadata__": {**metadata, "sha256": digest}, **tensors})


def _dumped(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER_BYTES:
        raise InvalidEntryError("its layers are too many for a file")
    return struct.pack("<Q", len(text)) + text


def _tensors(weights: Sequence[SavedWeight]) -> dict[str, Any]:
    """What the header says of the tensors: all values, then all scales."""
    tensors: dict[str, Any] = {}
    end = 0
    for weight in weights:
        begin, end = end, end + weight.size
        tensors[f"{weight.name}.weight"] = {"dtype": weight.dtype, "shape": weight.shape, "data_offsets": [begin, end]}
    for weight in weights:
        begin, end = end, end + 4 * weight.scales
        tensors[f"{weight.name}.scale"] = {"dtype": "F32", "shape": [weight.scales], "data_offsets": [begin, end]}
    return tensors
