"""How the scales of weights are spread, and that a weight comes back from whatever scales a format has."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from onlinequant_backend.kernels import reference
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, PER_CHANNEL, PER_TENSOR, Format, ScaleDesc
from onlinequant_backend.quantization.weight_quantization import quantize_weight
from tests.helpers.tiny import noise

IN_BLOCKS = dataclasses.replace(INT8, name="blocks", matrix_scale=ScaleDesc("block", 8))


@pytest.mark.parametrize(
    ("format", "weight", "granularity", "shape"),
    [
        (ONEDNN, (6, 32), "channel", (6,)),
        (INT8, (6, 32), "channel", (6,)),
        (FP8, (6, 32), "tensor", (1,)),
        (FP8, (6, 32, 1, 1), "tensor", (1,)),
        (FP8, (6, 32, 3, 3), "channel", (6,)),
        (IN_BLOCKS, (6, 32), "block", (6, 4)),
        (IN_BLOCKS, (6, 32, 3, 3), "channel", (6,)),
    ],
)
def test_scales(format: Format, weight: tuple[int, ...], granularity: str, shape: tuple[int, ...]) -> None:
    assert format.scale_of(weight).granularity == granularity
    q, scale = quantize_weight(noise(*weight), format)
    assert (q.shape, scale.shape, scale.shape) == (weight, shape, format.scale_shape(weight))
    step = float(scale.max()) * (32 if format.weight.is_floating_point else 1)  # the largest there is
    assert (reference.dequantize_weight(q, scale) - noise(*weight)).abs().max() <= 0.51 * step


def test_a_block_has_a_scale_of_its_own() -> None:
    weight = torch.ones(2, 16)
    weight[1, 8:] = 1000
    _, scale = quantize_weight(weight, IN_BLOCKS)
    torch.testing.assert_close(scale, torch.tensor([[1.0, 1.0], [1.0, 1000.0]]) / 127)
    weight[0, 3] = torch.nan
    q, scale = quantize_weight(weight, IN_BLOCKS)
    assert scale.isfinite().tolist() == [[False, True], [True, True]]
    assert not q[0].any() and q[1].all()


def test_one_scale_is_for_matrices_alone() -> None:
    assert (FP8.matrix_scale, FP8.weight_scale) == (PER_TENSOR, PER_CHANNEL)


def test_names_are_in_keys_and_stay() -> None:
    assert [format.name for format in (ONEDNN, INT8, FP8)] == ["onednn", "int8", "fp8"]
