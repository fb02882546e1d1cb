from __future__ import annotations

from typing import Any

import pytest
import torch

from onlinequant_backend import ops
from onlinequant_backend.kernels import reference
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, Format
from onlinequant_backend.quantization.ranges import ActivationRange, freeze
from onlinequant_backend.quantization.weight_quantization import quantize_weight
from tests.helpers.tiny import noise

FORMATS = [pytest.param(format, id=format.name) for format in (ONEDNN, INT8, FP8)]
INTEGERS = FORMATS[:2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANGES = [(-1.0, 1.0), (-0.3, 6.0), (0.0, 2.0), (-5.0, 0.0)]


def check(op: Any, arguments: tuple[Any, ...]) -> None:
    """``opcheck``, which cannot compare fp8 on a CPU: what it compares so is left to int8."""
    fp8 = any(getattr(argument, "dtype", argument) is torch.float8_e4m3fn for argument in arguments)
    dispatch = ("test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    no_comparison = ("test_autograd_registration", "test_faketensor", *dispatch)
    torch.library.opcheck(op, arguments, test_utils=no_comparison if fp8 else ("test_schema", *no_comparison))


def qparams(low: float, high: float, format: Format = ONEDNN) -> torch.Tensor:
    return freeze(ActivationRange(low, high), format, "minmax")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", INTEGERS)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_quantize_rounds_to_the_nearest(low: float, high: float, format: Format, dtype: torch.dtype) -> None:
    scales = qparams(low, high, format)
    x = torch.linspace(low, high, 1001).to(dtype).clamp(low, high)
    xq = ops.quantize(x, scales, format.activation, False)
    assert xq.dtype is format.activation
    if format is ONEDNN:
        assert int(xq.max()) - int(xq.min()) >= 251
    else:
        assert int(xq.abs().max()) == 126
    error = (reference.dequantize(xq, scales) - x.double()).abs()
    assert error.max() <= scales[2] * 0.5001


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_fp8_rounds_to_the_nearest(low: float, high: float, dtype: torch.dtype) -> None:
    """Half of the last of three bits of mantissa; near zero, half of the smallest number."""
    scales = qparams(low, high, FP8)
    x = torch.cat([torch.linspace(low, high, 1001), torch.linspace(low, high, 1001) / 5000]).to(dtype).clamp(low, high)
    xq = ops.quantize(x, scales, FP8.activation, False)
    assert xq.dtype is torch.float8_e4m3fn
    assert xq.float().abs().max() == 448 / 2  # of which half is kept free
    error = (reference.dequantize(xq, scales) - x.double()).abs()
    assert (error <= (x.double().abs() / 16).clamp(min=float(scales[2]) * 2**-10) * 1.0001).all()


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_clips_outside_of_the_range(format: Format) -> None:
    x = torch.tensor([-1e30, -9.0, 9.0, 1e30])
    low, high = format.limits
    xq = ops.quantize(x, qparams(-1, 1, format), format.activation, False)
    assert xq.tolist() == [low, low, high, high]


def test_fp8_does_not_clip_up_to_twice_the_range() -> None:
    x = torch.tensor([-2.0, -1.5, 1.5, 2.0])
    for format, fits in ((FP8, True), (INT8, False), (ONEDNN, False)):
        scales = qparams(-1, 1, format)
        result = reference.dequantize(ops.quantize(x, scales, format.activation, False), scales)
        assert torch.allclose(result, x.double(), rtol=1 / 15) == fits
    scales = qparams(-1, 1, FP8)
    assert ops.quantize(x * 1.1, scales, FP8.activation, False)[[0, 3]].tolist() == [-448, 448]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_passes_for_no_number(format: Format, dtype: torch.dtype) -> None:
    x = torch.tensor([0.5, torch.nan, -0.5, torch.inf, 900.0, -torch.inf], dtype=dtype)
    scales = qparams(-1, 1, format)
    xq = ops.quantize(x, scales, format.activation, False)
    assert reference.dequantize(xq, scales).isfinite().tolist() == [True, False] * 3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (2.0, 3.0), (-3.0, -2.0), (0.0, 0.0)])
def test_zero_is_exact(low: float, high: float, format: Format) -> None:
    scales = qparams(low, high, format)
    xq = ops.quantize(torch.zeros(3), scales, format.activation, False)
    assert reference.dequantize(xq, scales).tolist() == [0, 0, 0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "layout"), [((2, 6, 4, 5), torch.channels_last), ((2, 6, 3, 4, 5), torch.channels_last_3d)]
)
def test_layout_of_a_quantized_image(shape: tuple[int, ...], layout: torch.memory_format, format: Format) -> None:
    image = noise(*shape)
    scales = qparams(-3, 3, format)
    for x in (image, image.contiguous(memory_format=layout)):
        for_conv, for_linear = (ops.quantize(x, scales, format.activation, last) for last in (True, False))
        assert for_conv.is_contiguous(memory_format=layout)
        assert for_linear.is_contiguous()
        assert torch.equal(for_conv.float(), for_linear.float())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_quantize(dtype: torch.dtype, channels_last: bool, format: Format) -> None:
    x = noise(1, 4, 3, 3, dtype=dtype)
    check(ops.quantize, (x, qparams(-3, 3, format), format.activation, channels_last))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("shape", "dtype"), list(zip([(8,), (3, 8), (2, 3, 8)], DTYPES, strict=True)))
def test_opcheck_linear(shape: tuple[int, ...], dtype: torch.dtype, format: Format) -> None:
    scales = qparams(-3, 3, format)
    weight, weight_scale = quantize_weight(noise(5, 8), format)
    bias = None if dtype is torch.float32 else noise(5, dtype=dtype)
    xq = ops.quantize(noise(*shape), scales, format.activation, False)
    check(ops.linear, (xq, scales, weight, weight_scale, bias, dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("shape", "dtype"), list(zip([(8,), (3, 8), (2, 3, 8)], DTYPES, strict=True)))
@pytest.mark.parametrize("quantized", [False, True])
def test_opcheck_geglu(shape: tuple[int, ...], dtype: torch.dtype, quantized: bool, format: Format) -> None:
    scales = qparams(-3, 3, format)
    weight, weight_scale = quantize_weight(noise(10, 8), format)
    bias = None if dtype is torch.float32 else noise(10, dtype=dtype)
    xq = ops.quantize(noise(*shape), scales, format.activation, False)
    out_qparams, out_dtype = (scales, format.activation) if quantized else (None, dtype)
    check(ops.geglu, (xq, scales, weight, weight_scale, bias, out_qparams, out_dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "dtype"), list(zip([(2, 8, 3, 4), (1, 8, 1, 1), (2, 8, 2, 3, 4)], DTYPES, strict=True))
)
@pytest.mark.parametrize("affine", [False, True])
def test_opcheck_group_norm(shape: tuple[int, ...], dtype: torch.dtype, affine: bool, format: Format) -> None:
    weight, bias = noise(2, 8, dtype=dtype) if affine else (None, None)
    x = noise(*shape, dtype=dtype)
    check(ops.group_norm, (x, 4, weight, bias, 1e-5, affine, qparams(-3, 3, format), format.activation))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 12, 5, 4), (1, 12, 2, 3, 4)])
def test_group_norm_matches_the_reference(shape: tuple[int, ...], silu: bool, format: Format) -> None:
    x, weight, bias, scales = noise(*shape), noise(12, seed=2), noise(12, seed=3), qparams(-3, 3, format)
    expected = reference.group_norm(x, 3, weight, bias, 1e-5, silu)
    xq = ops.group_norm(x, 3, weight, bias, 1e-5, silu, scales, format.activation)
    assert xq.is_contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    same = xq.float() == ops.quantize(expected, scales, format.activation, True).float()
    assert same.double().mean() > 0.99  # float32 may round another way


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "weight_shape", "stride", "padding", "dilation", "dtype", "added"),
    [
        ((2, 4, 6, 6), (5, 4, 3, 3), [1, 1], [1, 1], [1, 1], torch.float32, True),
        ((1, 4, 7, 6), (5, 4, 3, 2), [2, 1], [0, 1], [2, 1], torch.bfloat16, False),
        ((2, 4, 6, 6), (1, 4, 1, 1), [1, 1], [0, 0], [1, 1], torch.float16, True),
        ((1, 4, 3, 3), (5, 4, 3, 3), [1, 1], [0, 0], [1, 1], torch.float32, False),
        ((1, 4, 5, 3, 3), (5, 4, 3, 1, 1), [1, 1, 1], [1, 0, 0], [1, 1, 1], torch.bfloat16, True),
    ],
)
def test_opcheck_conv(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    dtype: torch.dtype,
    added: bool,
    format: Format,
) -> None:
    scales = qparams(-3, 3, format)
    weight, weight_scale = quantize_weight(noise(*weight_shape), format)
    bias = None if dtype is torch.float32 else noise(weight_shape[0], dtype=dtype)
    xq = ops.quantize(noise(*shape), scales, format.activation, True)
    arguments = (xq, scales, weight, weight_scale, bias, stride, padding, dilation, dtype)
    if added:
        residual = torch.ones_like(ops.conv(*arguments)).contiguous()
        arguments = (*arguments, residual, noise(*residual.shape[:2], dtype=dtype))
    check(ops.conv, arguments)


# --- Attention ---


def heads(tokens: int, size: int = 64, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """[2, 3, tokens, size], as a linear layer gives them."""
    return torch.randn(2, tokens, 3, size).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("format", "bound"), [("fp8", 0.07), ("int8", 0.02)])
def test_attention_is_near_the_reference(format: str, bound: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = heads(70, dtype=dtype), heads(150, dtype=dtype), heads(150, dtype=dtype)
    k += 30  # as the keys of some channels are
    y = ops.attention(q, k, v, 0.125, format)
    expected = reference.attention(q, k, v, 0.125)
    assert (y.dtype, y.shape) == (dtype, q.shape)
    assert y.transpose(1, 2).is_contiguous()
    error = (y.double() - expected).norm() / expected.norm()
    assert bound / 30 < error < bound
    check(ops.attention, (q, k, v, 0.125, format))


@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize(("queries", "tokens"), [(0, 5), (5, 0)])
def test_attention_of_nothing(queries: int, tokens: int, format: str) -> None:
    q, k, v = heads(queries), heads(tokens), heads(tokens)
    assert torch.equal(ops.attention(q, k, v, 0.125, format), torch.zeros(2, 3, queries, 64, dtype=q.dtype))


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_attention_shows_what_is_not_finite(format: str) -> None:
    for place in range(3):
        given = heads(5), heads(5), heads(5)
        given[place][1, 2, 3, 4] = torch.inf
        assert not ops.attention(*given, 0.125, format).isfinite().all()


def test_attention_says_what_it_cannot() -> None:
    x = torch.empty(2, 3, 5, 64, device="meta")
    with pytest.raises(ValueError, match="attention has the formats int8, fp8, not int4"):
        ops.attention(x, x, x, 0.125, "int4")
    with pytest.raises(ValueError, match="heads of one size, and these are of 64, 64 and 32"):
        ops.attention(x, x, x[..., :32], 0.125, "fp8")
