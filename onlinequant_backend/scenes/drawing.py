"""Antialiased shapes, drawn for whole batches at once from signed distances."""

from __future__ import annotations

from collections.abc import Callable

import torch

PICTURE_SIZE = 64

# Each maps offsets from a shape's centre, to the right and downwards, and its radius to the distance from its outline,
# negative inside, all in pixels; Inigo Quilez, "2D distance functions". Outside of corners it is a lower bound.
Distance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _circle(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, y) - radius


def _square(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9 * radius


def _triangle(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Its tip is ``radius`` above the centre, its base 0.8 of that below and as wide as a circle."""
    side = (1.8 * x.abs() - y - radius) / (1 + 1.8**2) ** 0.5
    return torch.maximum(side, y - 0.8 * radius)


def _cross(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(long - radius, short - 0.3 * radius)


def _ring(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return (torch.hypot(x, y) - 0.75 * radius).abs() - 0.25 * radius


DISTANCES: dict[str, Distance] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}


def coverage(shape: torch.Tensor, radius: torch.Tensor, centre: torch.Tensor, size: int = PICTURE_SIZE) -> torch.Tensor:
    """How much of each pixel a shape covers, [N, size, size] in [0, 1].

    ``shape``: int64 [N], indices into ``DISTANCES``; ``radius``: float32 [N] and ``centre``: float32 [N, 2], to the
    right and downwards, in pixels.
    """
    places = torch.arange(size, dtype=centre.dtype, device=centre.device) + 0.5
    x = places[None, None, :] - centre[:, 0, None, None]
    y = places[None, :, None] - centre[:, 1, None, None]
    radius = radius[:, None, None]
    distances = torch.stack([distance(x, y, radius) for distance in DISTANCES.values()])
    chosen = distances[shape, torch.arange(len(shape), dtype=torch.int64, device=shape.device)]
    return (0.5 - chosen).clamp(0, 1)  # as wide as a pixel, for an edge that is straight within it


def paint(background: torch.Tensor, colour: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, H, W]: K shapes of ``colour`` [N, K, 3] that ``cover`` [N, K, H, W] ``background`` [N, 3]."""
    picture = background[:, :, None, None]
    for index in range(colour.shape[1]):
        picture = torch.lerp(picture, colour[:, index, :, None, None], cover[:, index, None])
    return picture
