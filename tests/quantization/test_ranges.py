from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from onlinequant_backend import ops
from onlinequant_backend.kernels import reference
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, ONEDNN_7, Format
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.quantization.observation import Observation
from onlinequant_backend.quantization.ranges import ActivationRange, freeze
from tests.helpers.tiny import noise, relative_error

METHODS = ["minmax", "mse", "percentile"]
FORMATS = [pytest.param(format, id=format.name) for format in (ONEDNN, INT8, FP8)]
INTEGERS = FORMATS[:2]


def observed(*calls: torch.Tensor) -> ActivationRange:
    seen = ActivationRange()
    for x in calls:
        seen.update(x)
    return seen


def squared_error(x: torch.Tensor, format: Format, method: str) -> float:
    qparams = freeze(observed(*x.split(2048)), format, method)
    xq = ops.quantize(x, qparams, format.activation, False)
    return float((reference.dequantize(xq, qparams) - x).square().mean())


def heavy_tailed(count: int) -> torch.Tensor:
    """The quantiles of Student's t distribution with two degrees of freedom."""
    p = (torch.arange(count) + 0.5) / count
    return (2 * p - 1) / (2 * p * (1 - p)).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_range_is_exact_over_all_calls(dtype: torch.dtype) -> None:
    calls = [noise(3, 500, 11, seed=seed, dtype=dtype) for seed in range(3)]
    # One value among thousands, which no sample need hit.
    calls[1][2, 77, 5] = 123
    seen = observed(*calls)
    assert (seen.minimum, seen.maximum) == (min(float(x.min()) for x in calls), 123)
    assert seen.is_finite()


@pytest.mark.parametrize("format", [ONEDNN, ONEDNN_7], ids=lambda format: format.name)
@pytest.mark.parametrize(
    ("low", "high", "zero_point"), [(-1.0, 3.0, 64), (0.5, 3.0, 1), (-3.0, -0.5, 253), (-2.0, 2.0, 127)]
)
def test_minmax_covers_the_range_and_zero(low: float, high: float, zero_point: float, format: Format) -> None:
    levels = 254 - 2 * 1.125  # one at each end is for what lies beyond
    qparams = freeze(observed(torch.tensor([low, high])), format, "minmax")
    inverse, zero, scale = qparams.tolist()
    assert (qparams.dtype, qparams.shape) == (torch.float32, (3,))
    assert scale == pytest.approx((max(high, 0) - min(low, 0)) / levels, rel=1e-6)
    assert inverse * scale == pytest.approx(1, rel=1e-6)
    assert zero == int(zero)
    assert zero == zero_point


@pytest.mark.parametrize(("format", "top"), [(INT8, 127 - 1.125), (FP8, 448 / 2)], ids=["int8", "fp8"])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (-3.0, 1.0), (0.5, 3.0), (-3.0, -0.5)])
def test_minmax_of_a_symmetric_format_covers_the_range_on_both_sides(
    low: float, high: float, format: Format, top: float
) -> None:
    qparams = freeze(observed(torch.tensor([low, high])), format, "minmax")
    inverse, zero, scale = qparams.tolist()
    assert (qparams.dtype, qparams.shape, zero) == (torch.float32, (3,), 0)
    assert scale == pytest.approx(3 / top, rel=1e-6)
    assert inverse * scale == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("x", [noise(1000), noise(1000) + 20, noise(1000) - 20, noise(1000).abs(), heavy_tailed(1000)])
def test_zero_is_representable(x: torch.Tensor, format: Format, method: str) -> None:
    qparams = freeze(observed(x), format, method)
    assert 0 <= qparams[1] <= (254 if format is ONEDNN else 0)
    xq = ops.quantize(torch.zeros(1), qparams, format.activation, False)
    assert reference.dequantize(xq, qparams).item() == 0


@pytest.mark.parametrize("format", INTEGERS)
@pytest.mark.parametrize("sign", [1, -1])
def test_mse_clips_outliers(sign: int, format: Format) -> None:
    x = heavy_tailed(16384)
    x = sign * torch.cat([x, x[x > 0]])  # more of them on one side
    minmax, mse = (freeze(observed(*x.split(2048)), format, method) for method in ("minmax", "mse"))
    assert mse[2] < 0.98 * minmax[2]
    assert squared_error(x, format, "mse") < 0.98 * squared_error(x, format, "minmax")


@pytest.mark.parametrize("format", INTEGERS)
def test_mse_keeps_what_the_sample_has_missed(format: Format) -> None:
    x = noise(1_000_000)
    x[3] = 100  # of trained models' activations, such a one is worth more than its square
    assert freeze(observed(x), format, "mse")[2] > 0.7 * freeze(observed(x), format, "minmax")[2]


@pytest.mark.parametrize("format", INTEGERS)
def test_percentile_clips_one_in_ten_thousand(format: Format) -> None:
    x = noise(60000)
    xq = ops.quantize(x, freeze(observed(x), format, "percentile"), format.activation, False).float()
    lowest, highest = format.limits
    # Bins of the histogram and steps of the format make it a little more.
    assert 0.4e-4 < float(((xq == lowest) | (xq == highest)).float().mean()) < 6e-4


def test_nothing_is_clipped_in_fp8() -> None:
    seen = observed(torch.cat([noise(65535), torch.tensor([100.0])]))
    for format, clipped in ((FP8, False), (INT8, True)):
        minmax, mse, percentile = (freeze(seen, format, method) for method in ("minmax", "mse", "percentile"))
        assert torch.equal(minmax, mse) == torch.equal(minmax, percentile) != clipped


@pytest.mark.parametrize("format", INTEGERS)
@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: x + 0.5, lambda x: -x, lambda x: x * 1e-6], ids=["mixed", "positive", "-", "tiny"]
)
def test_mse_is_no_worse_where_nothing_is_an_outlier(
    make: Callable[[torch.Tensor], torch.Tensor], format: Format
) -> None:
    torch.manual_seed(0)
    x = make(torch.rand(8192) - 0.5)
    assert squared_error(x, format, "mse") <= squared_error(x, format, "minmax") * 1.01


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", FORMATS)
def test_input_that_is_always_zero(format: Format, method: str) -> None:
    x = torch.zeros(2, 16)
    qparams = freeze(observed(x, x), format, method)
    assert torch.isfinite(qparams).all()
    assert qparams[2] > 0
    assert ops.quantize(x, qparams, format.activation, False).float().eq(qparams[1]).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-30, 6e4])
def test_input_that_is_always_the_same(value: float, format: Format, method: str) -> None:
    x = torch.full((2, 16), value)
    assert squared_error(x, format, method) ** 0.5 <= abs(value) / 254


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_one_number_that_is_not_finite_is_found(value: float, call: int) -> None:
    calls = [noise(64, 1000, seed=seed) for seed in range(3)]
    calls[call][33, 501] = value
    assert not observed(*calls).is_finite()


def test_nothing_observed_is_not_finite() -> None:
    assert not ActivationRange().is_finite()


@pytest.mark.parametrize(
    "shape",
    [
        (2, 320, 64, 64),
        (1, 9, 64, 64),
        (1, 8, 4, 32, 32),
        (1, 320, 32, 32),
        (1, 1280, 16, 16),
    ],
)
def test_no_channel_is_overlooked_where_channels_come_last(shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    x[:, 1::5] *= 6  # wide enough to keep the scale from being clipped to what the other channels need
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    rows_of_pixels, channels_last = (
        freeze(observed(y), ONEDNN, "mse")[2] for y in (x, x.contiguous(memory_format=layout))
    )
    assert channels_last == pytest.approx(float(rows_of_pixels), rel=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [100, 1000000])
def test_what_is_kept_of_an_activation_is_small_and_a_copy(size: int, dtype: torch.dtype) -> None:
    x = noise(size, dtype=dtype)
    seen = observed(x)
    before = freeze(seen, ONEDNN, "mse")
    x.zero_()
    assert torch.equal(freeze(seen, ONEDNN, "mse"), before)
    held = sum(part.untyped_storage().nbytes() for parts in seen.histograms for part in parts)
    assert held <= 16384


WEIGHTS = [noise(4, 8)] * 3


class TestObservation:
    @pytest.fixture
    def layers(self) -> list[Layer]:
        return [Layer(None, ONEDNN_7, "minmax") for _ in range(3)]

    def test_hands_the_output_on(self, layers: list[Layer]) -> None:
        y = noise(2, 4)
        assert Observation(layers, WEIGHTS).see(0, 0, noise(2, 8), y, None) is y

    def test_readers_of_one_tensor_share_their_range(self, layers: list[Layer]) -> None:
        observation, x, y = Observation(layers, WEIGHTS), noise(2, 8), noise(2, 4)
        for index, first in ((0, 0), (1, 0), (2, 2)):
            observation.see(index, first, x, y, None)
        first_range, second_range, third_range = (layer.observed for layer in layers)
        assert first_range is second_range is not third_range
        assert len(first_range.histograms) == len(third_range.histograms) == 1

    def test_readers_that_come_together_late_keep_ranges_of_their_own(self, layers: list[Layer]) -> None:
        """A layer that was observed in another graph, where it read something else."""
        observation, y = Observation(layers, WEIGHTS), noise(2, 4)
        for index in (0, 1):
            observation.see(index, index, noise(2, 8, seed=index), y, None)
        shared = noise(2, 8) * 9
        for index in (0, 1):
            observation.see(index, 0, shared, y, None)
        assert layers[0].observed is not layers[1].observed
        assert layers[0].observed.maximum == layers[1].observed.maximum == float(shared.max())

    def test_probing_hands_on_the_8_bit_output_of_one_layer(self, layers: list[Layer]) -> None:
        x, weight, bias = noise(16, 32), noise(8, 32), noise(8)
        y = x @ weight.t() + bias
        layers[1].observed.update(x)
        layers[1].refresh(weight)
        observation = Observation(layers, probed=(1,))
        assert observation.see(0, 0, x, y, bias) is y
        assert 0 < relative_error(observation.see(1, 1, x, y, bias), y) < 0.05
        assert layers[0].observed.minimum is None

    @pytest.mark.parametrize("most", [2**26, 48])
    def test_measuring_compares_outputs_of_finite_layers(
        self, layers: list[Layer], most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("onlinequant_backend.quantization.output_error._MOST", most)
        x, weight, bias = noise(16, 32), noise(8, 32), noise(8)
        y = x @ weight.t() + bias
        observation = Observation(layers, [weight] * len(layers), compares=True, kept={0})
        observation.see(0, 0, x, y, bias)
        observation.see(1, 1, x.clone().fill_(torch.nan), y, bias)
        assert [layer.weight is not None for layer in layers[:2]] == [True, False]
        measured, not_measured = layers[0].sensitivity, layers[1].sensitivity
        assert measured is not None and not_measured is None
        error = layers[0].quantized_output(x, bias, y) - y
        assert measured.mae == pytest.approx(float(error.abs().mean()))
        assert measured.mse == pytest.approx(float(error.square().mean()))
        assert measured.relative == pytest.approx(measured.mae / float(y.abs().mean()))
        assert 0 < measured.relative < 0.05
