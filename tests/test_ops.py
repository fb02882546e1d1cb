from __future__ import annotations

import pytest
import torch

from onlinequant_backend import ops
from onlinequant_backend.calibration import ActivationRange, freeze
from onlinequant_backend.kernels import reference
from onlinequant_backend.layers import quantize_weight
from tests.tiny import noise

BITS = [7, 8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def qparams(low: float, high: float, bits: int) -> torch.Tensor:
    return freeze(ActivationRange(torch.tensor(low), torch.tensor(high)), bits, "minmax")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.3, 6.0), (0.0, 2.0), (-5.0, 0.0)])
def test_quantize_rounds_to_the_nearest(low: float, high: float, bits: int, dtype: torch.dtype) -> None:
    scales = qparams(low, high, bits)
    x = torch.linspace(low, high, 1001).to(dtype).clamp(low, high)
    xq = ops.quantize(x, scales, bits, False)
    assert xq.dtype is torch.uint8
    assert int(xq.max()) - int(xq.min()) >= 2**bits - 2
    # Half a step, and at the ends another half that rounding the zero point may have moved the range by.
    error = (reference.dequantize(xq, scales) - x.double()).abs()
    inside = (x > low + scales[2] / 2) & (x < high - scales[2] / 2)
    assert error[inside].max() <= scales[2] * 0.5001
    assert error.max() <= scales[2] * 1.0001


@pytest.mark.parametrize("bits", BITS)
def test_quantize_clips_outside_of_the_range(bits: int) -> None:
    x = torch.tensor([-1e30, -9.0, 9.0, 1e30, torch.inf, -torch.inf])
    top = 2**bits - 1
    assert ops.quantize(x, qparams(-1, 1, bits), bits, False).tolist() == [0, 0, top, top, top, 0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (2.0, 3.0), (-3.0, -2.0), (0.0, 0.0)])
def test_zero_is_exact(low: float, high: float, bits: int) -> None:
    scales = qparams(low, high, bits)
    assert reference.dequantize(ops.quantize(torch.zeros(3), scales, bits, False), scales).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("shape", "layout"), [((2, 6, 4, 5), torch.channels_last), ((2, 6, 3, 4, 5), torch.channels_last_3d)]
)
def test_layout_of_a_quantized_image(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    image = noise(*shape)
    scales = qparams(-3, 3, 8)
    for x in (image, image.contiguous(memory_format=layout)):
        for_conv, for_linear = (ops.quantize(x, scales, 8, channels_last) for channels_last in (True, False))
        assert for_conv.is_contiguous(memory_format=layout)
        assert for_linear.is_contiguous()
        assert torch.equal(for_conv, for_linear)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_quantize(dtype: torch.dtype, channels_last: bool) -> None:
    torch.library.opcheck(ops.quantize, (noise(1, 4, 3, 3, dtype=dtype), qparams(-3, 3, 7), 7, channels_last))


@pytest.mark.parametrize(("shape", "dtype"), list(zip([(8,), (3, 8), (2, 3, 8)], DTYPES, strict=True)))
def test_opcheck_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scales = qparams(-3, 3, 7)
    weight, weight_scale = quantize_weight(noise(5, 8))
    bias = None if dtype is torch.float32 else noise(5, dtype=dtype)
    xq = ops.quantize(noise(*shape), scales, 7, False)
    torch.library.opcheck(ops.linear, (xq, scales, weight, weight_scale, bias, dtype))


@pytest.mark.parametrize(
    ("shape", "weight_shape", "stride", "padding", "dilation", "dtype"),
    [
        ((2, 4, 6, 6), (5, 4, 3, 3), [1, 1], [1, 1], [1, 1], torch.float32),
        ((1, 4, 7, 6), (5, 4, 3, 2), [2, 1], [0, 1], [2, 1], torch.bfloat16),
        ((2, 4, 6, 6), (1, 4, 1, 1), [1, 1], [0, 0], [1, 1], torch.float16),
        ((1, 4, 3, 3), (5, 4, 3, 3), [1, 1], [0, 0], [1, 1], torch.float32),
        ((1, 4, 5, 3, 3), (5, 4, 3, 1, 1), [1, 1, 1], [1, 0, 0], [1, 1, 1], torch.bfloat16),
    ],
)
def test_opcheck_conv(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    dtype: torch.dtype,
) -> None:
    scales = qparams(-3, 3, 7)
    weight, weight_scale = quantize_weight(noise(*weight_shape))
    bias = None if dtype is torch.float32 else noise(weight_shape[0], dtype=dtype)
    xq = ops.quantize(noise(*shape), scales, 7, True)
    torch.library.opcheck(ops.conv, (xq, scales, weight, weight_scale, bias, stride, padding, dilation, dtype))
