from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from onlinequant_backend.graph import ConvGeometry
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, ONEDNN_7, Format
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.quantization.weight_quantization import quantize_weight
from tests.helpers.graph_probe import host_precision
from tests.helpers.tiny import noise, relative_error

FORMAT = host_precision().format
FORMATS = [pytest.param(format, id=format.name) for format in (FORMAT, INT8, FP8)]
PADDED = ConvGeometry((1, 1), (1, 1), (1, 1))


# --- quantize_weight ---


@pytest.mark.parametrize(
    ("format", "top"), [(ONEDNN, 127), (ONEDNN_7, 63), (INT8, 127)], ids=["onednn", "7 bits", "int8"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 33), (4, 3, 3, 3), (4, 3, 3, 1, 1), (6, 3, 1, 1), (1, 1)])
def test_weight_is_within_half_a_step(shape: tuple[int, ...], dtype: torch.dtype, format: Format, top: int) -> None:
    weight = uneven(*shape, dtype=dtype)
    q, scale = quantize_weight(weight, format)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, shape, torch.float32, shape[:1])
    rows, q_rows = weight.float().flatten(1), q.flatten(1)
    assert torch.allclose(scale, rows.abs().amax(1) / top)
    assert (q_rows.abs().amax(1) == top).all()
    assert ((q_rows * scale[:, None] - rows).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((8, 33), 1),
        ((1, 1), 1),
        ((5, 3, 1, 1), 1),
        ((5, 3, 1, 1, 1), 1),
        ((4, 3, 3, 3), 4),
        ((4, 3, 1, 2), 4),
        ((4, 3, 3, 1, 1), 4),
    ],
)
def test_fp8_weight_is_within_half_of_its_last_digit(shape: tuple[int, ...], scales: int, dtype: torch.dtype) -> None:
    weight = uneven(*shape, dtype=dtype)
    q, scale = quantize_weight(weight, FP8)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.float8_e4m3fn, shape, torch.float32, (scales,))
    assert q.is_contiguous()
    rows, q_rows = weight.double().view(scales, -1), q.double().view(scales, -1)
    if scales == 1:  # a power of two
        assert scale.log2() == (rows.abs().max() / 448).log2().ceil()
        assert 448 / 2 <= q_rows.abs().max() <= 448
    else:
        assert torch.allclose(scale.double(), rows.abs().amax(1) / 448)
        assert (q_rows.abs().amax(1) == 448).all()
    step = scale.double()[:, None]
    assert ((q_rows * step - rows).abs() <= torch.maximum(rows.abs() / 16, step * 2**-10) * 1.0001).all()


@pytest.mark.parametrize("format", [ONEDNN, INT8, FP8], ids=lambda format: format.name)
@pytest.mark.parametrize("shape", [(700, 2000), (3, 700000), (260, 500, 3, 3)])
def test_weight_of_many_blocks(shape: tuple[int, ...], format: Format) -> None:
    """It is quantized a few rows at a time; the first row of a block, the last one and the largest count alike."""
    weight = noise(*shape)
    for row in (0, shape[0] // 2, -1):
        weight[row] *= 3 + row
    q, scale = quantize_weight(weight, format)
    exact = weight.flatten(1).abs().amax(1) / format.weight_limit
    if len(shape) == 2 and format is FP8:
        exact = exact.amax()[None].log2().ceil().exp2()
    assert torch.allclose(scale, exact)
    result = q.float() * scale.view(-1, *[1] * (len(shape) - 1))
    assert relative_error(result, weight) < 0.03


def uneven(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A weight with channels of very different sizes."""
    factors = 10.0 ** torch.arange(-2, shape[0] - 2).clamp(max=2)
    return (noise(*shape) * factors.view(-1, *[1] * (len(shape) - 1))).to(dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 3, 3)])
def test_weight_of_zeros(shape: tuple[int, ...], format: Format) -> None:
    q, scale = quantize_weight(torch.zeros(shape), format)
    assert q.float().eq(0).all()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_channel_of_zeros() -> None:
    weight = noise(3, 8)
    weight[1] = 0
    q, scale = quantize_weight(weight)
    assert q[1].eq(0).all()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_channel_that_is_not_finite_has_such_a_scale(format: Format, value: float) -> None:
    weight = noise(3, 8, 2, 2)
    expected = quantize_weight(weight, format)
    weight[1, 5, 0, 1] = value
    q, scale = quantize_weight(weight, format)
    assert torch.isfinite(scale).tolist() == [True, False, True]
    assert torch.isfinite(q.float()).all()
    assert torch.equal(q[::2].float(), expected[0][::2].float())
    assert torch.equal(scale[::2], expected[1][::2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_linear_that_is_not_finite_is_refused(format: Format, value: float) -> None:
    weight = noise(3, 8)
    weight[1, 5] = value
    q, scale = quantize_weight(weight, format)
    assert torch.isfinite(scale).tolist() == ([False] if format is FP8 else [True, False, True])
    assert torch.isfinite(q.float()).all()
    layer = Layer(None, format, "minmax")
    layer.observed.update(noise(8))
    assert layer.refusal() is None
    layer.refresh(weight)
    assert layer.refusal() == "its weight is not finite"
    assert not torch.isfinite(layer.quantized_output(noise(2, 8), None, torch.zeros(2, 3))[:, 1]).any()


@pytest.mark.parametrize(("value", "reason"), [(torch.nan, "not finite"), (torch.inf, "not finite"), (0.0, "zero")])
def test_input_that_cannot_be_calibrated_is_refused(value: float, reason: str) -> None:
    layer = Layer(None, FORMAT, "mse")
    layer.observed.update(torch.full((8,), value))
    refusal = layer.refusal()
    assert refusal is not None and reason in refusal


# --- Layer ---


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("geometry", [None, PADDED])
def test_output_of_a_layer_is_close_to_float(geometry: ConvGeometry | None, format: Format) -> None:
    x, weight = (noise(16, 24), noise(8, 24)) if geometry is None else (noise(2, 24, 5, 5), noise(8, 24, 3, 3))
    y = x @ weight.t() if geometry is None else torch.conv2d(x, weight, padding=1)
    layer = Layer(geometry, format, "minmax")
    assert layer.quantized_output(x, None, y) is y  # nothing to compute it from yet
    layer.observed.update(x)
    layer.refresh(weight)
    result = layer.quantized_output(x, None, y.bfloat16())
    assert result.dtype is torch.bfloat16
    assert 0 < relative_error(result, y) < 0.05


def test_qparams_are_frozen_at_their_first_use() -> None:
    layer = Layer(None, FORMAT, "minmax")
    layer.observed.update(noise(16))
    first = layer.qparams
    layer.observed.update(noise(16) * 100)
    assert layer.qparams is first


def test_refresh_quantizes_only_what_changed() -> None:
    layer, weight = Layer(None, FORMAT, "minmax"), noise(8, 24)
    assert layer.refresh(weight)
    assert not layer.refresh(weight)
    weight[0, 0] += 1
    assert layer.refresh(weight)
    assert not layer.refresh(weight)
    assert layer.refresh(weight.clone())
    layer.copy.forget()
    assert layer.refresh(weight)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("geometry", [None, PADDED])
def test_quantizing_again_goes_into_the_same_tensors(geometry: ConvGeometry | None, format: Format) -> None:
    """Compiled graphs hold them as inputs."""
    shape = (8, 24) if geometry is None else (8, 24, 3, 3)
    x = noise(16, 24) if geometry is None else noise(1, 24, 5, 5)
    layer = Layer(geometry, format, "minmax")
    layer.observed.update(x)
    outputs = []
    tensors = []
    for seed in range(2):
        weight = noise(*shape, seed=seed) * (1 + 9 * seed)
        y = x @ weight.t() if geometry is None else torch.conv2d(x, weight, padding=1)
        layer.requantize(weight)
        tensors.append((layer.weight, layer.weight_scale, layer.qparams))
        outputs.append(relative_error(layer.quantized_output(x, None, y), y))
    assert [id(tensor) for tensor in tensors[0]] == [id(tensor) for tensor in tensors[1]]
    assert max(outputs) < 0.05


@pytest.mark.parametrize("in_use", [False, True])
def test_copy_is_freed_unless_a_graph_runs_on_it(in_use: bool) -> None:
    layer = Layer(None, FORMAT, "minmax")
    layer.refresh(noise(8, 24))
    layer.copy.in_use = in_use
    layer.copy.drop()
    assert (layer.weight is not None, layer.weight_scale is not None) == (in_use, in_use)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "layout"), [((8, 4, 3, 3), torch.channels_last), ((8, 4, 3, 3, 3), torch.channels_last_3d)]
)
def test_only_packed_weights_are_behind_a_handle(
    shape: tuple[int, ...], layout: torch.memory_format, format: Format
) -> None:
    ones = (1,) * (len(shape) - 2)
    layer, weight = Layer(ConvGeometry(ones, ones, ones), format, "minmax"), noise(*shape)
    layer.refresh(weight)
    assert layer.weight is not None
    assert (layer.weight.dtype, layer.weight.shape) == (format.weight, shape)
    if format is FORMAT:
        assert layer.weight.untyped_storage().nbytes() == 1
    else:
        assert layer.weight.is_contiguous(memory_format=layout)
        assert torch.equal(layer.weight.float(), quantize_weight(weight, format)[0].float())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_8_bit_copies_are_ordinary_tensors(mode: Callable[[], torch.no_grad], format: Format) -> None:
    layer = Layer(None, format, "mse")
    with mode():
        weight = noise(8, 24)
        layer.observed.update(noise(16, 24))
        layer.refresh(weight)
        made = (layer.weight, layer.weight_scale, layer.qparams)
    layer.requantize(weight)
    assert not any(tensor is None or tensor.is_inference() or tensor.requires_grad for tensor in made)


# --- measure_sensitivity ---


def test_large_outputs_are_compared_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = noise(5, 4, 6, 6), noise(4, 4, 3, 3)
    layer = Layer(PADDED, FORMAT, "minmax")
    layer.observed.update(x)
    layer.refresh(weight)
    y = torch.nn.functional.conv2d(x, weight, padding=1)
    layer.measure_sensitivity(x, None, y)
    whole = layer.sensitivity
    compared: list[tuple[int, ...]] = []
    quantized_output = layer.quantized_output

    def noted(x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        compared.append(tuple(x.shape))
        return quantized_output(x, bias, y)

    monkeypatch.setattr(layer, "quantized_output", noted)
    monkeypatch.setattr("onlinequant_backend.quantization.output_error._MOST", 300)
    layer.measure_sensitivity(x, None, y)
    assert compared == [(2, 4, 6, 6), (2, 4, 6, 6), (1, 4, 6, 6)]
    assert whole is not None and layer.sensitivity is not None
    assert 0 < layer.sensitivity.mse == pytest.approx(whole.mse)
    assert layer.sensitivity.relative == pytest.approx(whole.relative)
