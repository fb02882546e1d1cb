"""The symmetric formats without instructions for them, and what ``ops`` adds to a kernel's result on any CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from onlinequant_backend import ops
from onlinequant_backend.graph.conv_geometry import ConvGeometry
from onlinequant_backend.kernels import emulated, reference
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, Format
from onlinequant_backend.kernels.operands import Operands
from onlinequant_backend.quantization.ranges import ActivationRange, freeze
from onlinequant_backend.quantization.weight_quantization import quantize_weight
from tests.helpers.graph_probe import host_precision
from tests.helpers.kernel_cases import CONVS, DTYPES, LINEARS, TOLERANCE
from tests.helpers.tiny import noise

EMULATED = [pytest.param(format, id=format.name) for format in (INT8, FP8)]
PADDED, POINTWISE = ConvGeometry((1, 1), (1, 1), (1, 1)), ConvGeometry((1, 1), (0, 0), (1, 1))
OVER_TIME = ConvGeometry((1, 1, 1), (1, 0, 0), (1, 1, 1))
HOST = host_precision().format
FORMATS = [pytest.param(HOST, id=ONEDNN.name), *EMULATED]


def with_kinds(cases: Sequence[Any]) -> list[Any]:
    """Each of ``cases`` with a dtype and whether there is a bias: every pair of these with some of the cases."""
    kinds = itertools.cycle(zip(DTYPES * 2, [True, False] * 3, strict=True))
    return [pytest.param(*case.values, *kind, id=case.id) for case, kind in zip(cases, kinds, strict=False)]


def operands(format: Format, x_shape: tuple[int, ...], weight_shape: tuple[int, ...], bias: bool = True) -> Operands:
    """The first five arguments of every op."""
    x = noise(*x_shape)
    qparams = freeze(ActivationRange(float(x.min()), float(x.max()) + 0.5), format, "minmax")
    xq = ops.quantize(x, qparams, format.activation, len(weight_shape) > 2)
    weight, scale = quantize_weight(noise(*weight_shape, seed=2), format)
    return Operands(xq, qparams, weight, scale, noise(weight_shape[0], seed=3) if bias else None)


def assert_close(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """``roundings``: how often a sum is rounded to ``dtype``."""
    assert (result.dtype, result.shape) == (dtype, expected.shape)
    largest = float(expected.abs().max())
    atol = 1e-6 * largest + (roundings - 1) * TOLERANCE[dtype] * largest
    torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[dtype], atol=atol)


def each(value: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else value


@pytest.mark.parametrize("format", EMULATED)
@pytest.mark.parametrize(("shape", "outputs", "dtype", "bias"), with_kinds(LINEARS))
def test_linear(shape: tuple[int, ...], outputs: int, format: Format, bias: bool, dtype: torch.dtype) -> None:
    given = operands(format, shape, (outputs, shape[-1]), bias)
    expected = reference.linear(given, torch.float64)
    for function in (ops.as_op("linear", emulated), ops.linear):
        result = function(*given, dtype)
        assert_close(result, expected, dtype)
        assert result.is_contiguous()


@pytest.mark.parametrize("format", EMULATED)
@pytest.mark.parametrize(("shape", "weight_shape", "stride", "padding", "dilation", "dtype", "bias"), with_kinds(CONVS))
def test_conv(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    format: Format,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    given = operands(format, shape, weight_shape, bias)
    geometry = ConvGeometry(*(each(value, len(shape) - 2) for value in (stride, padding, dilation)))
    expected = reference.conv(given, geometry, torch.float64)
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for function in (ops.as_op("conv", emulated), ops.conv):
        result = function(*given, *geometry, dtype)
        assert_close(result, expected, dtype)
        assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("format", EMULATED)
def test_nan_of_an_input_or_a_scale_reaches_the_output(format: Format) -> None:
    xq, qparams, weight, scale, bias = operands(format, (5, 32), (8, 32))
    broken = scale.clone()
    broken[-1] = torch.nan
    result = ops.linear(xq, qparams, weight, broken, bias, torch.float32)
    assert result.isnan().all(0).tolist() == [format is FP8 or channel == 7 for channel in range(8)]
    if format is FP8:
        x = noise(5, 32)
        x[3, 4] = torch.nan
        xq = ops.quantize(x, qparams, format.activation, False)
        result = ops.linear(xq, qparams, weight, scale, bias, torch.float32)
        assert result.isnan().all(1).tolist() == [row == 3 for row in range(5)] == result.isnan().any(1).tolist()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "dtype", "bias"),
    [((32,), torch.float32, True), ((17, 32), torch.bfloat16, False), ((2, 3, 32), torch.float16, True)],
)
def test_geglu(shape: tuple[int, ...], format: Format, bias: bool, dtype: torch.dtype) -> None:
    given = operands(format, shape, (48, 32), bias)
    result = ops.geglu(*given, None, dtype)
    assert_close(result, reference.geglu(given, torch.float64), dtype)
    assert result.shape == (*shape[:-1], 24)
    assert result.is_contiguous()


@pytest.mark.parametrize("format", FORMATS)
def test_geglu_in_8_bit(format: Format) -> None:
    given = operands(format, (2, 40, 32), (96, 32))
    exact = reference.geglu(given, torch.float64)
    clipped = exact.abs().max() / 3 / format.headroom
    out_qparams = freeze(ActivationRange(-float(clipped), float(clipped)), format, "minmax")
    result = ops.geglu(*given, out_qparams, format.activation)
    expected = ops.quantize(exact.float(), out_qparams, format.activation, False)
    assert (result.dtype, result.shape) == (format.activation, exact.shape)
    differs = result.float() != expected.float()
    assert differs.float().mean() < 0.01  # what lies between two steps may go to either
    step = out_qparams[2] * (exact.abs() / out_qparams[2] / 8).clamp(min=2**-9) if format is FP8 else out_qparams[2]
    error = (reference.dequantize(result, out_qparams) - reference.dequantize(expected, out_qparams)).abs()
    assert (error <= step * 1.001).all()
    low, high = format.limits
    assert (result.float() == low).any() and (result.float() == high).any()


@pytest.mark.parametrize("added", ["residual", "channel_add", "both"])
@pytest.mark.parametrize(
    ("shape", "weight_shape", "geometry", "format", "dtype"),
    [
        pytest.param((2, 12, 6, 5), (8, 12, 3, 3), PADDED, HOST, torch.float16, id="3x3"),
        pytest.param(
            (2, 12, 7, 6), (8, 12, 3, 3), ConvGeometry((2, 2), (1, 1), (1, 1)), INT8, torch.bfloat16, id="stride"
        ),
        pytest.param((2, 12, 6, 5), (8, 12, 1, 1), POINTWISE, FP8, torch.float32, id="1x1"),
        pytest.param((2, 12, 4, 5, 3), (8, 12, 3, 1, 1), OVER_TIME, HOST, torch.float32, id="over time"),
    ],
)
def test_conv_adds_a_residual_and_a_number_to_each_channel(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: ConvGeometry,
    added: str,
    format: Format,
    dtype: torch.dtype,
) -> None:
    given = operands(format, shape, weight_shape)
    expected = reference.conv(given, geometry, torch.float64)
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    more: dict[str, Any] = {}
    if added != "residual":
        more["channel_add"] = noise(*expected.shape[:2], seed=5, dtype=dtype) * 9
        expected = expected + more["channel_add"].double()[(..., *[None] * (len(shape) - 2))]
    if added != "channel_add":
        residual = noise(*expected.shape, seed=4, dtype=dtype) * 9
        expected = expected + residual.double()
    for memory_format in (layout, torch.contiguous_format):
        if added != "channel_add":
            more["residual"] = residual.contiguous(memory_format=memory_format)
        result = ops.conv(*given, *geometry, dtype, **more)
        assert_close(result, expected, dtype, roundings=3)
        assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_conv_has_the_dtype_asked_for_whatever_is_added(format: Format, dtype: torch.dtype) -> None:
    given = operands(format, (2, 12, 6, 5), (8, 12, 3, 3))
    residual, channel_add = noise(2, 8, 6, 5, seed=4), noise(2, 8, seed=5)
    result = ops.conv(*given, *PADDED, dtype, residual, channel_add)
    expected = reference.conv(given, PADDED, torch.float64) + residual + channel_add[:, :, None, None]
    assert_close(result, expected, dtype, roundings=3)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("format", EMULATED)
def test_what_is_not_finite_spreads_as_in_float(format: Format) -> None:
    x, weight = noise(2, 12, 6, 5), noise(8, 12, 3, 3, seed=2)
    qparams = freeze(ActivationRange(float(x.min()), float(x.max())), format, "minmax")
    x[1, 3, 2, 2] = torch.inf
    xq = ops.quantize(x, qparams, format.activation, True)
    result = ops.conv(xq, qparams, *quantize_weight(weight, format), None, *PADDED, torch.float32)
    assert torch.equal(result.isfinite(), torch.conv2d(x, weight, padding=1).isfinite())
