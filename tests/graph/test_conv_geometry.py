from __future__ import annotations

import pytest
import torch

from onlinequant_backend.graph.conv_geometry import ConvGeometry

ONE, NONE = (1, 1), (0, 0)


@pytest.mark.parametrize(
    ("geometry", "weight", "expected"),
    [
        (ConvGeometry(ONE, NONE, ONE), (8, 4, 1, 1), True),
        (ConvGeometry((1, 1, 1), (0, 0, 0), (1, 1, 1)), (8, 4, 1, 1, 1), True),
        (ConvGeometry(ONE, NONE, ONE), (8, 4, 1, 3), False),
        (ConvGeometry(ONE, (0, 1), ONE), (8, 4, 1, 1), False),
        (ConvGeometry((1, 2), NONE, ONE), (8, 4, 1, 1), False),
    ],
)
def test_pointwise_convolution_is_a_linear_layer(
    geometry: ConvGeometry, weight: tuple[int, ...], expected: bool
) -> None:
    assert geometry.is_pointwise(weight) == expected


@pytest.mark.parametrize(
    ("shape", "kernel", "geometry"),
    [
        ((9, 8), (3, 3), ConvGeometry(ONE, ONE, ONE)),
        ((9, 8), (3, 2), ConvGeometry((2, 1), (0, 1), (1, 3))),
        ((5, 9, 8), (3, 1, 1), ConvGeometry((1, 2, 2), (1, 0, 0), (1, 1, 1))),
    ],
)
def test_output_size_is_that_of_torch(shape: tuple[int, ...], kernel: tuple[int, ...], geometry: ConvGeometry) -> None:
    convolve = torch.conv2d if len(shape) == 2 else torch.conv3d
    y = convolve(torch.zeros(1, 1, *shape), torch.zeros(1, 1, *kernel), None, *geometry)
    assert geometry.output_size(shape, kernel) == y.shape[2:]
