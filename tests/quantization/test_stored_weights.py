"""Weights that are in 8 bit already, as tensors of classes of other libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onlinequant_backend.kernels.formats import FP8, INT8, Format
from onlinequant_backend.kernels.reference import dequantize_weight
from onlinequant_backend.quantization import stored_weights
from onlinequant_backend.quantization.weight_changes import Snapshot, Stamp
from onlinequant_backend.quantization.weight_quantization import quantize_weight, scale_of
from tests.helpers.tiny import noise, relative_error
from tests.helpers.wrapped_weights import Float8Tensor, Int8Tensor, QuantizedTensor, Unknown, wrapped

WEIGHT = noise(24, 48) / 7 * torch.logspace(-1, 1, 24).view(-1, 1)
FLOAT8, INT = torch.float8_e4m3fn, torch.int8
KEPT = [
    pytest.param(Int8Tensor, INT, True, INT8, id="int8 per row"),
    pytest.param(Int8Tensor, INT, False, INT8, id="int8 per tensor"),
    pytest.param(Float8Tensor, FLOAT8, False, FP8, id="float8 per tensor"),
    pytest.param(QuantizedTensor, FLOAT8, False, FP8, id="ComfyUI's float8"),
]
ROUNDED = [
    pytest.param(Float8Tensor, FLOAT8, True, FP8, 0.03, id="float8 per row, one scale is allowed"),
    pytest.param(Float8Tensor, FLOAT8, True, INT8, 0.01, id="float8 in int8"),
    pytest.param(Int8Tensor, INT, True, FP8, 0.03, id="int8 in float8"),
]


@pytest.mark.parametrize(("kind", "values", "per_row", "format"), KEPT)
def test_values_and_scales_of_the_same_format_are_kept(
    kind: Any, values: torch.dtype, per_row: bool, format: Format
) -> None:
    weight = wrapped(kind, WEIGHT, values, per_row)
    q, scale = quantize_weight(weight, format)
    assert scale.shape == format.scale_shape(weight.shape)
    exact = weight.qdata.double() * weight.scale.double()
    assert relative_error(dequantize_weight(q, scale), exact) < 1e-6
    again = quantize_weight(weight.dequantize(), format)
    assert relative_error(dequantize_weight(*again), exact) > 1e-6 or values == INT  # the scales would be other ones


@pytest.mark.parametrize(("kind", "values", "per_row", "format", "close"), ROUNDED)
def test_other_formats_are_rounded_once(
    kind: Any, values: torch.dtype, per_row: bool, format: Format, close: float
) -> None:
    weight = wrapped(kind, WEIGHT, values, per_row)
    q, scale = quantize_weight(weight, format)
    assert relative_error(dequantize_weight(q, scale), weight.dequantize()) < close
    assert scale_of(weight, format) == scale_of(weight.dequantize(), format)


@pytest.mark.parametrize("format", [FP8, INT8], ids=["fp8", "int8"])
def test_a_scale_that_is_not_finite_shows(format: Format) -> None:
    weight = wrapped(Float8Tensor, WEIGHT, per_row=False)
    weight.scale.fill_(torch.nan)
    assert not quantize_weight(weight, format)[1].isfinite().any()


def test_a_given_scale_and_smoothing_are_heeded() -> None:
    weight = wrapped(Float8Tensor, WEIGHT, per_row=False)
    q, scale = quantize_weight(weight, FP8, scale_of_all=2.0**-5)
    assert scale.tolist() == [2.0**-5]
    assert relative_error(dequantize_weight(q, scale), weight.dequantize()) < 0.03
    smoothing = torch.linspace(0.5, 1, 48)
    q, scale = quantize_weight(wrapped(Int8Tensor, WEIGHT, INT), INT8, None, smoothing)
    assert relative_error(dequantize_weight(q, scale) * smoothing, WEIGHT) < 0.02


def test_a_zero_point_is_heeded() -> None:
    weight = wrapped(Int8Tensor, WEIGHT, INT, zero_point=torch.zeros(24, 1, dtype=INT))
    assert stored_weights.read(weight).scale is not None
    weight.zero_point.fill_(3)
    assert torch.equal(stored_weights.in_float(weight), weight.dequantize())


def test_what_does_more_than_its_values_is_not_read() -> None:
    weight = wrapped(Int8Tensor, WEIGHT, INT, act_pre_scale=torch.ones(48))
    assert "input" in str(stored_weights.unreadable(weight))
    with pytest.raises(TypeError, match="input"):
        stored_weights.read(weight)
    assert "subclass" in str(stored_weights.unreadable(wrapped(Unknown, WEIGHT)))
    packed = wrapped(QuantizedTensor, WEIGHT)
    packed._layout_cls = "TensorCoreNVFP4Layout"
    assert "TensorCoreNVFP4Layout" in str(stored_weights.unreadable(packed))
    assert stored_weights.unreadable(WEIGHT) is None


@pytest.mark.parametrize("part", ["qdata", "scale"])
@pytest.mark.parametrize("change", ["in place", "as data", "another tensor"])
def test_a_change_of_any_part_is_seen(part: str, change: str) -> None:
    weight = wrapped(Int8Tensor, WEIGHT, INT)
    snapshot, stamp = Snapshot([WEIGHT, weight], [False, False]), Stamp.of(weight)
    assert snapshot.is_current([WEIGHT, weight]) and stamp.matches(Stamp.of(weight))
    tensor = getattr(weight, part)
    if change == "in place":
        tensor.mul_(2)
    elif change == "as data":
        tensor.data.add_(1)
    else:
        setattr(weight, part, tensor.clone())
    assert not snapshot.is_current([WEIGHT, weight])
    assert not stamp.matches(Stamp.of(weight))
