"""Weights that are float8 already."""

from __future__ import annotations

import pytest
import torch

from onlinequant_backend.kernels.formats import FP8, INT8
from onlinequant_backend.kernels.reference import dequantize_weight
from onlinequant_backend.quantization.weight_quantization import quantize_weight, scale_of
from tests.helpers.tiny import noise, relative_error

SHAPES = [(24, 48), (24, 16, 3, 3)]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def float8(shape: tuple[int, ...], dtype: torch.dtype, size: float = 0.05) -> torch.Tensor:
    return (noise(*shape) * size * torch.logspace(-2, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.001, 0.05, 20])
def test_the_copy_in_the_same_format_has_the_same_values(shape: tuple[int, ...], size: float) -> None:
    weight = float8(shape, torch.float8_e4m3fn, size)
    q, scale = quantize_weight(weight, FP8)
    assert torch.equal(dequantize_weight(q, scale), weight.to(dequantize_weight(q, scale).dtype))


def test_another_scale_would_round_again() -> None:
    weight = float8(SHAPES[1], torch.float8_e4m3fn)
    error = relative_error(dequantize_weight(*quantize_weight(weight.float(), FP8)), weight.float())
    assert error > 0.01  # more than half of what float8 itself rounds a weight by


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_as_near_as_from_float(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = float8(shape, dtype)
    q, scale = quantize_weight(weight, INT8)
    expected, expected_scale = quantize_weight(weight.float(), INT8)
    assert torch.equal(q, expected) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_a_weight_that_is_not_finite_shows(dtype: torch.dtype) -> None:
    weight = float8(SHAPES[0], dtype)
    weight[3, 5] = torch.nan
    assert not scale_of(weight, FP8).isfinite()
    for format in (FP8, INT8):
        assert not quantize_weight(weight, format)[1].isfinite().all()
