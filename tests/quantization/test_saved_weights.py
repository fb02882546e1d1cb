"""A saved 8-bit weight is used for the float weight that it was made of, and for no other one."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from onlinequant_backend.cache import weights_file
from onlinequant_backend.cache.weights_file import WeightsFile
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, Format
from onlinequant_backend.quantization import saved_weights, weight_copy
from onlinequant_backend.quantization.saved_weights import Source, made, matching
from onlinequant_backend.quantization.weight_copy import Copy
from onlinequant_backend.quantization.weight_quantization import quantize_weight

KEY = "a" * 48
FORMATS = (ONEDNN, INT8, FP8)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def saved(sources: Sequence[Source], path: Path) -> WeightsFile:
    buffer = io.BytesIO()
    weights_file.write(buffer, KEY, "UNet", [source.outline() for source in sources], made(sources))
    path.write_bytes(buffer.getvalue())
    return weights_file.read(path, KEY)


@pytest.mark.parametrize("format", FORMATS, ids=[format.name for format in FORMATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (32, 16, 3, 3), (7, 5)], ids=str)
def test_what_is_read_is_what_quantizing_makes(
    shape: tuple[int, ...], dtype: torch.dtype, format: Format, tmp_path: Path
) -> None:
    smoothing = torch.ones(1, shape[1], 1, 1)[(..., *[0] * (4 - len(shape)))].clone()
    smoothing.view(-1)[0] = 0.5
    sources = [
        Source("plain", weight(*shape, dtype=dtype), format, None),
        Source("smoothed", weight(*shape, dtype=dtype), format, smoothing.view(1, -1, *[1] * (len(shape) - 2))),
    ]
    found = matching(saved(sources, tmp_path / "file"), sources)
    assert sorted(found) == [0, 1]
    for position, source in enumerate(sources):
        read = found[position].read()
        assert read is not None
        for ours, expected in zip(
            read, quantize_weight(source.weight, format, smoothing=source.smoothing), strict=True
        ):
            assert ours.dtype == expected.dtype and ours.shape == expected.shape
            assert torch.equal(ours.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


CHANGES: dict[str, Callable[[Source], Source]] = {
    "one value": lambda source: source._replace(weight=changed(source.weight)),
    "another dtype": lambda source: source._replace(weight=source.weight.double()),
    "transposed": lambda source: source._replace(weight=source.weight.t()),
    "other rows first": lambda source: source._replace(weight=source.weight.flip(0)),
    "another shape": lambda source: source._replace(weight=source.weight.view(32, 128)),
    "another format": lambda source: source._replace(format=ONEDNN),
    "smoothing": lambda source: source._replace(smoothing=torch.ones(64)),
    "another name": lambda source: source._replace(name="other"),
    "quantized already": lambda source: source._replace(weight=source.weight.to(torch.float8_e4m3fn)),
}


def changed(tensor: torch.Tensor) -> torch.Tensor:
    """Another value at a place that no sample has."""
    tensor = tensor.clone()
    tensor[17, 23] = torch.nextafter(tensor[17, 23], torch.tensor(9.0))
    return tensor


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_is_not_used_for_another_weight(change: Callable[[Source], Source], tmp_path: Path) -> None:
    source = Source("layer", weight(64, 64), INT8, None)
    file = saved([source], tmp_path / "file")
    assert list(matching(file, [None, source, change(source)])) == [1]


def test_each_byte_of_what_is_read_counts(tmp_path: Path) -> None:
    source = Source("layer", weight(24, 9), FP8, None)
    path = tmp_path / "file"
    saved([source], path)
    data = path.read_bytes()
    size = 24 * 9 + 4
    for at in range(len(data) - size, len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        told: list[bool] = []
        found = matching(weights_file.read(path, KEY), [source], lambda: told.append(True))  # noqa: B023
        assert found[0].read() is None and told == [True]


@pytest.mark.parametrize("format", [ONEDNN, FP8], ids=["packed", "plain"])
def test_a_copy_takes_what_was_saved(format: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("layer", weight(32, 16), format, None)
    (found,) = matching(saved([source], tmp_path / "file"), [source]).values()
    quantized, copy = Copy(None, format), Copy(None, format)
    quantized.requantize(source.weight)
    monkeypatch.setattr(weight_copy, "quantize_weight", lambda *_: pytest.fail("it quantizes"))
    copy.requantize(source.weight, None, found)
    assert copy.is_current(source.weight)
    assert copy.weight is not None and copy.weight_scale is not None and quantized.weight_scale is not None
    assert torch.equal(copy.weight_scale, quantized.weight_scale)
    if format is FP8:
        assert quantized.weight is not None
        assert torch.equal(copy.weight.view(torch.uint8), quantized.weight.view(torch.uint8))


def test_a_copy_of_a_damaged_weight_is_quantized(tmp_path: Path) -> None:
    source = Source("layer", weight(32, 16), INT8, None)
    file = saved([source], tmp_path / "file")
    file.values["layer"][0] ^= 1  # of this process's view only
    copy, quantized = Copy(None, INT8), Copy(None, INT8)
    copy.requantize(source.weight, None, matching(file, [source])[0])
    quantized.requantize(source.weight)
    assert copy.weight is not None and quantized.weight is not None
    assert torch.equal(copy.weight, quantized.weight)


def test_a_weight_that_changes_after_it_was_compared_is_stale(tmp_path: Path) -> None:
    source = Source("layer", weight(32, 16), INT8, None)
    (found,) = matching(saved([source], tmp_path / "file"), [source]).values()
    source.weight.add_(1)
    copy = Copy(None, INT8)
    copy.requantize(source.weight, None, found)
    assert not copy.is_current(source.weight)


def test_a_weight_that_changes_while_it_is_saved_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("layer", weight(32, 16), INT8, None)

    def meanwhile(*given: object, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
        result = quantize_weight(*given, **more)  # type: ignore[arg-type]
        source.weight[3, 3] += 1
        return result

    monkeypatch.setattr(saved_weights, "quantize_weight", meanwhile)
    with pytest.raises(RuntimeError, match="changes"):
        list(made([source]))


@pytest.mark.parametrize(
    "tensor", [weight(32, 16)[:, ::2], weight(32, 16).to("meta"), weight(32, 16).to(torch.float8_e4m3fn)]
)
def test_special_weights_are_not_saved(tensor: torch.Tensor) -> None:
    assert not Source("layer", tensor, INT8, None).can_be_saved()
