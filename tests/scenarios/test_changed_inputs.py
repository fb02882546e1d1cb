"""Every kind of change of a layer's inputs, in every format, is noticed by the call that looks for it.

A check sees quantized values only, so what is noticed must not depend on anything else.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from onlinequant_backend import ops
from onlinequant_backend.compilation import counting_call
from onlinequant_backend.kernels import clip_counting
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, Format
from onlinequant_backend.quantization.layer_state import Layer
from tests.helpers.tiny import noise, relative_error

CLOSE = 0.04  # of values rounded to 8 bit
WEIGHT = noise(8, 32)
FORMATS = pytest.mark.parametrize("format", [ONEDNN, INT8, FP8], ids=["uint8", "int8", "fp8"])
METHODS = pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "both signs": lambda x: x,
    "positive": torch.abs,
    "clamped": lambda x: x.clamp(-0.5, 1),
    "shifted": lambda x: x + 5,
}
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "larger": lambda x: 8 * x,
    "smaller": lambda x: x / 100,
    "far smaller": lambda x: x / 1e5,
    "other sign": torch.neg,
    "shifted up": lambda x: x + 2 * (x.max() - x.min()),
    "shifted down": lambda x: x - 2 * (x.max() - x.min()),
}


def observed(make: Callable[[torch.Tensor], torch.Tensor], format: Format, method: str, rows: int) -> Layer:
    layer = Layer(None, format, method)
    for seed in range(20):
        layer.observe(make(noise(rows, 32, seed=100 + seed)), WEIGHT)
    layer.freeze()
    return layer


def passed(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, clip_counting.Seen]:
    """What a layer makes of its input, and what a check sees of it."""
    kernel = clip_counting.counted(lambda xq, qparams: (xq.float() - qparams[1]) * qparams[2])
    xq = ops.quantize(x, layer.qparams, layer.format.activation, False)
    result, seen = counting_call.CountingCall(lambda: kernel(xq, layer.qparams))()
    return result, seen[layer.qparams.data_ptr()]


@FORMATS
@METHODS
@pytest.mark.parametrize("rows", [1, 4, 500])
@pytest.mark.parametrize("name", INPUTS)
def test_a_change_that_does_harm_is_noticed_and_mended(name: str, rows: int, method: str, format: Format) -> None:
    make = INPUTS[name]
    for what, change in CHANGES.items():
        layer = observed(make, format, method, rows)
        x = change(make(noise(rows, 32)))
        before, seen = passed(layer, x)
        has_drifted = layer.has_drifted(seen)
        assert has_drifted or relative_error(before, x) < CLOSE, what
        if has_drifted:
            assert layer.refit(x)
        after, seen = passed(layer, x)
        assert relative_error(after, x) < CLOSE, what
        assert not layer.has_drifted(seen), what


@FORMATS
@METHODS
@pytest.mark.parametrize("name", INPUTS)
def test_the_same_distribution_changes_nothing(name: str, method: str, format: Format) -> None:
    make = INPUTS[name]
    layer = observed(make, format, method, 20)
    qparams = layer.qparams.clone()
    for seed in range(300):
        assert not layer.has_drifted(passed(layer, make(noise(20, 32, seed=1000 + seed)))[1]), seed
    assert torch.equal(layer.qparams, qparams)
