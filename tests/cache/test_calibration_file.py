from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors

from onlinequant_backend.cache import calibration_file
from onlinequant_backend.cache.calibration_checks import LEAST_SCALE
from onlinequant_backend.cache.calibration_file import (
    Calibration,
    InvalidEntryError,
    LayerCalibration,
    decode,
)
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, Format
from onlinequant_backend.quantization.ranges import ActivationRange, freeze
from tests.helpers.calibrations import CALIBRATION, KEY, LAYER, NEVER_FINITE, calibration

DATA = CALIBRATION.to_bytes(KEY)


def repacked(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """``data`` with a header that ``change`` changed in place, or replaced by what it returns."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    replaced = change(header)
    text = json.dumps(header if replaced is None else replaced).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def forged(made: Calibration, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A file with a right checksum of a calibration that may not be."""
    with monkeypatch.context() as patch:
        patch.setattr(calibration_file, "check", lambda calibration: None)
        return made.to_bytes(KEY)


def test_a_calibration_comes_back_as_it_was() -> None:
    key, loaded = decode(DATA)
    assert key == KEY
    assert (loaded.model, loaded.calls, loaded.about) == (CALIBRATION.model, 20, CALIBRATION.about)
    assert loaded.layers[1] == LAYER
    first = loaded.layers[0]
    assert first.minimum == -math.inf and math.isnan(first.maximum)
    assert first.qparams is None and first.sensitivity is None
    assert loaded.to_bytes(KEY) == DATA


floats = st.floats(width=32)


@st.composite
def layers(draw: st.DrawFn) -> LayerCalibration:
    low, high = sorted([draw(st.floats(width=32, allow_nan=False)), draw(st.floats(width=32, allow_nan=False))])
    qparams, lowest_peak = None, math.nan
    if math.isfinite(low) and math.isfinite(high) and (low or high):
        begin, end = min(low, 0.0), max(high, 0.0)
        scale = max((end - begin) / 254, LEAST_SCALE)
        qparams = (1 / scale, float(round(-begin / scale)), scale)
        lowest_peak = max(draw(st.sampled_from([1.0, 0.1])) * max(-begin, end), 2.0**-149)
    errors = [st.floats(min_value=0, width=32) | st.just(math.nan)] * 3
    sensitivity = draw(st.none() | st.tuples(*errors, st.booleans()))
    name = draw(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1))
    shape = tuple(draw(st.lists(st.integers(1, 50) | st.integers(1, 2**40), max_size=5)))
    clipped = draw(st.floats(0, 1, width=32))
    kind = draw(st.sampled_from(["conv", "linear"]))
    smoothing = None
    if len(shape) > 1 and shape[1] < 100 and draw(st.booleans()):
        smoothing = tuple(draw(st.sampled_from([1.0, 0.5, 2.0**-9])) if i % 2 else 1.0 for i in range(shape[1]))
    return LayerCalibration(name, kind, shape, low, high, qparams, sensitivity, lowest_peak, clipped, smoothing)


@hypothesis.given(st.lists(layers(), max_size=5), st.integers(0, 2**40))
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_calibration_comes_back_bit_by_bit(made: list[LayerCalibration], calls: int) -> None:
    original = Calibration("Model", calls, tuple(made), {})
    loaded = Calibration.from_bytes(original.to_bytes(KEY), KEY)
    assert loaded.to_bytes(KEY) == original.to_bytes(KEY)
    # By their text, which tells a negative zero and takes NaN for equal.
    assert repr(loaded) == repr(original)


@pytest.mark.parametrize(
    ("given", "kept"), [(0.1, struct.unpack("f", struct.pack("f", 0.1))[0]), (1e300, math.inf), (-0.0, -0.0)]
)
def test_floats_are_rounded_to_float32_before_they_are_kept(given: float, kept: float) -> None:
    made = dataclasses.replace(NEVER_FINITE, maximum=given)
    assert str(made.maximum) == str(kept)


def test_equal_calibrations_give_equal_bytes() -> None:
    about = dict(reversed(CALIBRATION.about.items()))
    assert calibration(about=about).to_bytes(KEY) == DATA


def test_other_programs_can_read_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    with safetensors.safe_open(tmp_path / "file", framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()} == {
        "minimum": ("float32", (2,)),
        "maximum": ("float32", (2,)),
        "lowest_peak": ("float32", (2,)),
        "clipped": ("float32", (2,)),
        "qparams": ("float32", (2, 3)),
        "sensitivity": ("float32", (2, 3)),
        "smoothing": ("float32", (320,)),
        "given": ("uint8", (2, 3)),
    }
    assert tensors["qparams"][1].tolist() == list(LAYER.qparams or ())
    assert tensors["given"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert (metadata["format"], metadata["version"], metadata["key"]) == (
        calibration_file.FORMAT,
        calibration_file.VERSION,
        KEY,
    )


def test_the_bytes_of_a_file_change_only_with_its_version() -> None:
    digest = "0ef8e64d7c4756eadf3c40cae0141182edb2a8fde262a0df6fb56ccaf823eb13"
    assert (calibration_file.VERSION, hashlib.sha256(DATA).hexdigest()) == ("4", digest)


def test_each_field_of_a_layer_is_in_the_file() -> None:
    columns = [column.name for column in calibration_file._COLUMNS]
    fields = [field.name for field in dataclasses.fields(LayerCalibration)]
    assert sorted([*columns, "name", "kind", "weight_shape"]) == sorted(fields)


def test_the_key_has_to_begin_as_asked_for() -> None:
    for prefix in (KEY, KEY[:48], KEY[:32], ""):
        assert Calibration.from_bytes(DATA, prefix).calls == 20
    with pytest.raises(InvalidEntryError, match=f"belongs to the key {KEY}"):
        Calibration.from_bytes(DATA, "0" * 48)


@pytest.mark.parametrize("key", ["", KEY[:63], KEY.upper(), "../" * 21 + "a"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(InvalidEntryError, match="64 lower-case hex digits"):
        CALIBRATION.to_bytes(key)


def test_every_flipped_bit_is_found() -> None:
    for position in range(len(DATA)):
        for bit in range(8):
            damaged = bytearray(DATA)
            damaged[position] ^= 1 << bit
            with pytest.raises(InvalidEntryError):
                decode(bytes(damaged))


def test_every_truncation_and_extension_is_found() -> None:
    for length in range(len(DATA)):
        with pytest.raises(InvalidEntryError):
            decode(DATA[:length])
    with pytest.raises(InvalidEntryError, match="bytes instead of"):
        decode(DATA + b"\0")


@hypothesis.given(st.binary() | st.builds(lambda rest: DATA[:8] + rest, st.binary(min_size=100)))
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(InvalidEntryError):
        decode(data)


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "header claims 9223372036854775808 bytes"),
        (struct.pack("<Q", 3) + b"{}", "header claims 3 bytes"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 2) + b"\xff\xff", "not JSON"),
        (struct.pack("<Q", len(DEEP)) + DEEP.encode(), "not JSON that can be read"),
        (struct.pack("<Q", 2) + b"{}", "not a calibration of onlinequant"),
        (bytes(calibration_file.MAX_BYTES + 1), "more than the 67108864 allowed"),
    ],
    ids=range(8),
)
def test_what_is_no_such_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidEntryError, match=message):
        decode(data)


def test_a_header_that_is_too_long_is_not_parsed() -> None:
    length = calibration_file.MAX_HEADER_BYTES + 1
    with pytest.raises(InvalidEntryError, match="16777216 allowed"):
        decode(struct.pack("<Q", length) + b" " * length)


def metadata(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update(changes)


def tensor(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(changes)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata(format="other"), "not a calibration of onlinequant"),
        (lambda header: {**header, "__metadata__": nested(3)}, "not a calibration of onlinequant"),
        (metadata(version="1"), "its version is '1'; this onlinequant reads '4'"),
        (metadata(version=nested(700)), "nested too deeply|its version is"),
        (metadata(version="9" * 10**6), r"its version is '9{99}\.\.\.; this"),
        (metadata(key=None), "has no key"),
        (metadata(key="../../etc/passwd"), "64 lower-case hex digits"),
        (metadata(key=KEY[::-1]), "checksum"),
        (metadata(calibration=None), "its metadata is not JSON"),
        (metadata(calibration="{}"), "does not list its layers"),
        (metadata(calibration=DEEP), "its metadata is not JSON"),
        (metadata(calibration='{"layers":{}}'), "does not list its layers"),
        (metadata(calibration=json.dumps({"layers": [0] * (calibration_file.MAX_LAYERS + 1)})), "at most 100000"),
        (metadata(calibration='{"layers":[[],[]]}'), "list of layers is in a wrong form"),
        (metadata(calibration='{"layers":[1,2],"model":"m","calls":1,"about":{}}'), "in a wrong form"),
        (metadata(calibration='{"layers":[["a","conv",3],["b","conv",[]]],"model":"m","calls":1}'), "wrong form"),
        (metadata(sha256="0" * 64), "checksum is wrong"),
        (metadata(more="text"), "checksum is wrong"),
        (tensor("qparams", dtype="F64"), "its tensor 'qparams' is .*F64.* but has to be .*F32"),
        (tensor("qparams", shape=[3, 2]), "'qparams'"),
        (tensor("minimum", data_offsets=[8, 16]), "'minimum'"),
        (tensor("given", data_offsets=[64, 2**62]), "'given'"),
        (tensor("given", more=1), "'given'"),
        (lambda header: {**header, "../../name": nested(100)}, "its tensor '../../name' is"),
        (lambda header: {name: value for name, value in header.items() if name != "maximum"}, "'maximum' is None"),
    ],
    ids=range(25),
)
def test_a_header_that_is_not_ours_is_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(InvalidEntryError, match=message):
        decode(repacked(DATA, change))


def layer(**changes: Any) -> Calibration:
    return calibration(layers=(dataclasses.replace(LAYER, **changes),))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (layer(qparams=(1 / 3.0, 0.0, math.nan)), "the scale nan"),
        (layer(qparams=(math.nan, 0.0, 3.0)), "1 / scale = nan"),
        (layer(qparams=(math.inf, 0.0, 0.0)), r"the scale 0\.0"),
        (layer(qparams=(-2.0, 0.0, -0.5)), r"the scale -0\.5"),
        (layer(qparams=(0.0, 0.0, math.inf)), "the scale inf"),
        (layer(qparams=(3.0, 0.0, 3.0)), r"the scale 3\.0 and 1 / scale = 3\.0"),
        (layer(qparams=(0.5, 256.0, 2.0)), r"zero point .* is 256\.0"),
        (layer(qparams=(0.5, -1.0, 2.0)), "zero point"),
        (layer(qparams=(0.5, 0.5, 2.0)), "zero point"),
        (layer(qparams=(0.5, math.nan, 2.0)), "zero point"),
        (layer(qparams=None), r"the range \[-1\.5, 3\.25\] and no scale"),
        (layer(minimum=-math.inf), r"the range \[-inf, 3\.25\] and a scale"),
        (layer(qparams=(64.0, 255.0, 0.015625)), "zero point"),
        (layer(qparams=(1e-30, 81.0, 1e30)), r"the range \[-1\.5, 3\.25\], but the scale 1\.0+\d*e\+30"),
        (layer(qparams=(1e-30, 0.0, 1e30)), "but the scale"),
        (layer(qparams=(1e30, 81.0, 1e-30)), "but the scale"),
        (layer(qparams=(32.0, 81.0, 0.03125)), "but the scale"),
        (layer(qparams=(64.0, 254.0, 0.015625)), "but the scale 0.015625 and the zero point 254"),
        (layer(qparams=(64.0, 2.0, 0.015625)), "but the scale 0.015625 and the zero point 2"),
        (layer(smoothing=(2.0**-126, *[1.0] * 319)), "no powers of two or too small"),
        (layer(smoothing=(0.75, *[1.0] * 319)), "no powers of two or too small"),
        (layer(smoothing=(0.5,) * 161 + (1.0,) * 159), "more than half"),
        (layer(minimum=4.0), r"begins at 4\.0 and ends at 3\.25"),
        (layer(sensitivity=(0.1, -0.1, 0.1, False)), "negative errors"),
        (layer(smoothing=(0.5,)), "has 1 factors of smoothing"),
        (layer(smoothing=(0.5,) * 319 + (0.0,)), r"not in \(0, 1\]"),
        (layer(lowest_peak=4.0), r"the range \[-1\.5, 3\.25\] and a call of 4\.0"),
        (layer(lowest_peak=0.0), r"a call of 0\.0"),
        (layer(lowest_peak=math.nan), "a call of nan"),
        (layer(clipped=1.5), "clipped a share of 1.5"),
        (layer(clipped=math.nan), "clipped a share of nan"),
        (layer(name=""), "layer's name is ''"),
        (layer(name="a\nb"), "cannot be printed"),
        (layer(name="\x1b[2J"), "cannot be printed"),
        (layer(name="\ud800"), "cannot be printed"),
        (layer(name="a" * 501), "longer than 500"),
        (layer(name=nested(600)), "not a text|nested too deeply"),
        (layer(kind="attention"), "of kind 'attention'"),
        (layer(weight_shape=(1, 0)), r"the shape \(1, 0\)"),
        (layer(weight_shape=(1, True)), "the shape"),
        (layer(weight_shape=(1.5,)), "the shape"),
        (layer(weight_shape=(1,) * 9), "the shape"),
        (calibration(calls=-1), "calls is -1"),
        (calibration(calls=True), "calls is True"),
        (calibration(calls="20"), "calls is '20'"),
        (calibration(model=""), "the model's name is ''"),
        (calibration(model="\r"), "the model's name"),
        (calibration(about=["torch"]), "not a mapping"),
        (calibration(about={str(number): "" for number in range(101)}), "at most 100"),
        (calibration(about={"torch": 2}), "'torch' is 2, not a text"),
        (calibration(about={"": "text"}), "a name of what it says"),
    ],
    ids=range(51),
)
def test_values_that_cannot_be_are_neither_written_nor_read(
    made: Calibration, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidEntryError, match=message):
        made.to_bytes(KEY)
    with pytest.raises(InvalidEntryError, match=message):
        decode(forged(made, monkeypatch))


def test_too_many_layers_are_not_written() -> None:
    with pytest.raises(InvalidEntryError, match="100001 layers"):
        calibration(layers=(LAYER,) * 100_001).to_bytes(KEY)


def test_too_long_a_header_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_file, "MAX_HEADER_BYTES", 100)
    with pytest.raises(InvalidEntryError, match="too many or too long names"):
        CALIBRATION.to_bytes(KEY)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-0.0, 0.0), (-math.inf, 1.0), (math.nan, math.nan)])
def test_a_range_that_rules_8_bit_out_needs_no_scale(low: float, high: float) -> None:
    made = layer(minimum=low, maximum=high, qparams=None)
    assert decode(made.to_bytes(KEY))[1].layers[0].qparams is None


@pytest.mark.parametrize("largest", [1e-35, 3e-5, 0.1, 7.0, 3.4e38])
@pytest.mark.parametrize("format", [ONEDNN, INT8, FP8], ids=["uint8", "int8", "fp8"])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.3), (0.5, 1.0), (-1.0, -0.2), (-1.0, 1.0)])
def test_scales_of_any_size_are_as_calibration_makes_them(
    low: float, high: float, format: Format, largest: float
) -> None:
    low, high = low * largest, high * largest
    qparams = freeze(ActivationRange(low, high), format, "minmax").tolist()
    made = layer(minimum=low, maximum=high, qparams=tuple(qparams), lowest_peak=max(-low, high))
    assert decode(made.to_bytes(KEY))[1].calls == 20
