from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from onlinequant_backend.layers import Layer, quantize_weight
from onlinequant_backend.passes import ConvGeometry
from tests.graph_probe import host_precision
from tests.tiny import noise, relative_error

BITS = host_precision().weight_bits
PADDED = ConvGeometry((1, 1), (1, 1), (1, 1))


# --- quantize_weight ---


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (7, 63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 33), (4, 3, 3, 3), (4, 3, 3, 1, 1), (1, 1)])
def test_weight_is_within_half_a_step(shape: tuple[int, ...], dtype: torch.dtype, bits: int, top: int) -> None:
    # Channels of very different sizes, for which one scale would not do.
    weight = noise(*shape) * 10.0 ** torch.arange(-2, shape[0] - 2).clamp(max=2).view(-1, *[1] * (len(shape) - 1))
    weight = weight.to(dtype)
    q, scale = quantize_weight(weight, bits)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, shape, torch.float32, shape[:1])
    rows, q_rows = weight.float().flatten(1), q.flatten(1)
    assert torch.allclose(scale, rows.abs().amax(1) / top)
    assert (q_rows.abs().amax(1) == top).all()
    assert ((q_rows * scale[:, None] - rows).abs() <= scale[:, None] * 0.5001).all()


def test_channel_of_zeros() -> None:
    weight = noise(3, 8)
    weight[1] = 0
    q, scale = quantize_weight(weight)
    assert q[1].eq(0).all()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_channel_that_is_not_finite_has_such_a_scale(value: float) -> None:
    weight = noise(3, 8)
    expected = quantize_weight(weight)
    weight[1, 5] = value
    q, scale = quantize_weight(weight)
    assert torch.isfinite(scale).tolist() == [True, False, True]
    assert torch.equal(q[::2], expected[0][::2])
    assert torch.equal(scale[::2], expected[1][::2])
    layer = Layer(None, BITS, "minmax")
    layer.observed.update(noise(8))
    assert layer.refusal() is None
    layer.refresh(weight)
    assert layer.refusal() == "its weight is not finite"


@pytest.mark.parametrize(("value", "reason"), [(torch.nan, "not finite"), (torch.inf, "not finite"), (0.0, "zero")])
def test_input_that_cannot_be_calibrated_is_refused(value: float, reason: str) -> None:
    layer = Layer(None, BITS, "mse")
    layer.observed.update(torch.full((8,), value))
    refusal = layer.refusal()
    assert refusal is not None and reason in refusal


# --- Layer ---


@pytest.mark.parametrize("geometry", [None, PADDED])
def test_output_of_a_layer_is_close_to_float(geometry: ConvGeometry | None) -> None:
    x, weight = (noise(16, 24), noise(8, 24)) if geometry is None else (noise(2, 24, 5, 5), noise(8, 24, 3, 3))
    y = x @ weight.t() if geometry is None else torch.conv2d(x, weight, padding=1)
    layer = Layer(geometry, BITS, "minmax")
    assert layer.quantized_output(x, None, y) is y  # nothing to compute it from yet
    layer.observed.update(x)
    layer.refresh(weight)
    result = layer.quantized_output(x, None, y.bfloat16())
    assert result.dtype is torch.bfloat16
    assert 0 < relative_error(result, y) < 0.05


def test_qparams_are_frozen_at_their_first_use() -> None:
    layer = Layer(None, BITS, "minmax")
    layer.observed.update(noise(16))
    first = layer.qparams
    layer.observed.update(noise(16) * 100)
    assert layer.qparams is first


def test_refresh_quantizes_only_what_changed() -> None:
    layer, weight = Layer(None, BITS, "minmax"), noise(8, 24)
    assert layer.refresh(weight)
    assert not layer.refresh(weight)
    weight[0, 0] += 1
    assert layer.refresh(weight)
    assert not layer.refresh(weight)
    assert layer.refresh(weight.clone())
    layer.forget()
    assert layer.refresh(weight)


@pytest.mark.parametrize("geometry", [None, PADDED])
def test_quantizing_again_goes_into_the_same_tensors(geometry: ConvGeometry | None) -> None:
    """Compiled graphs hold them as inputs."""
    shape = (8, 24) if geometry is None else (8, 24, 3, 3)
    x = noise(16, 24) if geometry is None else noise(1, 24, 5, 5)
    layer = Layer(geometry, BITS, "minmax")
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
    layer = Layer(None, BITS, "minmax")
    layer.refresh(noise(8, 24))
    layer.in_use = in_use
    layer.drop_copy()
    assert (layer.weight is not None, layer.weight_scale is not None) == (in_use, in_use)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_8_bit_copies_are_ordinary_tensors(mode: Callable[[], torch.no_grad]) -> None:
    layer = Layer(None, BITS, "mse")
    with mode():
        weight = noise(8, 24)
        layer.observed.update(noise(16, 24))
        layer.refresh(weight)
        made = (layer.weight, layer.weight_scale, layer.qparams)
    layer.requantize(weight)
    assert not any(tensor is None or tensor.is_inference() or tensor.requires_grad for tensor in made)
