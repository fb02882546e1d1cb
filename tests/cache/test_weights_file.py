"""A file of 8-bit weights gives back what was written, or is refused."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors

from onlinequant_backend.cache import weights_file
from onlinequant_backend.cache.calibration_checks import InvalidEntryError
from onlinequant_backend.cache.weights_file import SavedWeight
from tests.helpers.calibrations import KEY

NAME = KEY[:48]
WEIGHTS = (
    SavedWeight("blocks.0.to_q", "I8", (3, 5), 3, "0" * 16, "1" * 16),
    SavedWeight("conv", "F8_E4M3", (2, 3, 1, 1), 1, "ab" * 8, "cd" * 8),
)
BYTES = {"blocks.0.to_q": (bytes(range(15)), bytes(range(12))), "conv": (b"abcdef", b"wxyz")}


def written(path: Path, weights: tuple[SavedWeight, ...] = WEIGHTS, key: str = NAME) -> Path:
    outline = [dataclasses.replace(weight, source="0" * 16, checksum="0" * 16) for weight in weights]
    made = ((weight, memoryview(BYTES[weight.name][0]), BYTES[weight.name][1]) for weight in weights)
    with path.open("wb") as file:
        weights_file.write(file, key, "UNet", outline, made)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = weights_file.read(written(tmp_path / "file"), NAME)
    assert found.model == "UNet" and found.weights == {weight.name: weight for weight in WEIGHTS}
    assert {name: (bytes(found.values[name]), bytes(found.scales[name])) for name in found.weights} == BYTES


def test_others_can_read_it(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    with safetensors.safe_open(path, "pt") as file:
        assert file.get_tensor("blocks.0.to_q.weight").flatten().tolist() == list(range(15))
        assert file.get_tensor("conv.scale").shape == (1,)


def test_writing_other_weights_than_announced_fails(tmp_path: Path) -> None:
    made = ((weight, memoryview(b""), b"") for weight in WEIGHTS)
    with (tmp_path / "file").open("wb") as file, pytest.raises(ValueError, match="outline"):
        weights_file.write(file, NAME, "UNet", WEIGHTS[:1], made)


def header_changed(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data and len(old) == len(new)
        return data.replace(old, new, 1)

    return change


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "a few bytes": lambda data: data[:5],
    "half of the header": lambda data: data[:100],
    "no tensors": lambda data: data[: 8 + struct.unpack_from("<Q", data)[0]],
    "a byte less": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    "a long header": lambda data: struct.pack("<Q", 2**40) + data[8:],
    "no JSON": header_changed(b'{"', b"{{"),
    "nested": lambda data: struct.pack("<Q", 10**6) + b"[" * 10**6,
    "another format": header_changed(b"onlinequant-weights", b"onlinequant-wheels!"),
    "another version": header_changed(b'"version":"1"', b'"version":"2"'),
    "another source": header_changed(b"abababab", b"abababac"),
    "another checksum": header_changed(b"cdcdcdcd", b"cdcdcdce"),
    "another digest": header_changed(b'"sha256":"', b'"sha255":"'),
    "another layer": header_changed(b"blocks.0", b"blocks.1"),
    "another shape": header_changed(b"[3, 5]", b"[5, 3]"),
    "a negative size": header_changed(b"[3, 5]", b"[-3,5]"),
    "other offsets": header_changed(b"[0,15]", b"[1,15]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InvalidEntryError):
        weights_file.read(path, NAME)


def test_each_byte_of_the_header_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "file")
    data = path.read_bytes()
    for at in range(0, 8 + struct.unpack_from("<Q", data)[0], 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(InvalidEntryError):
            weights_file.read(path, NAME)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "F32"},
        {"scales": 0},
        {"scales": "1"},
        {"source": "no digits"},
        {"checksum": 7},
        {"shape": (2, "3")},
        {"name": "a" * 600},
    ],
    ids=str,
)
def test_a_file_that_no_process_can_have_written_is_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    """Its checksums are right."""
    weight = dataclasses.replace(WEIGHTS[1], **wrong)  # type: ignore[arg-type]
    header = weights_file._dumped
    about = json.dumps({"model": "UNet", "layers": [dataclasses.asdict(weight)]})
    metadata = {"format": "onlinequant-weights", "version": "1", "key": NAME, "weights": about}
    (tmp_path / "file").write_bytes(header({"__metadata__": metadata}) + bytes(100))
    with pytest.raises(InvalidEntryError, match="weight"):
        weights_file.read(tmp_path / "file", NAME)


def test_a_file_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "file", key="e" * 48)
    with pytest.raises(InvalidEntryError, match="belongs to the key"):
        weights_file.read(path, NAME)


def test_a_layer_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidEntryError, match="twice"):
        weights_file.read(written(tmp_path / "file", (WEIGHTS[0], WEIGHTS[0])), NAME)


@pytest.mark.posix
def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(written(tmp_path / "file"))
    with pytest.raises(InvalidEntryError, match="link"):
        weights_file.read(tmp_path / "link", NAME)
