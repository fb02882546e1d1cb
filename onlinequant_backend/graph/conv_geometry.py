"""Stride, padding and dilation of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ConvGeometry(NamedTuple):
    """Parameters of a convolution, one integer for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def is_pointwise(self, weight: Sequence[int]) -> bool:
        """Whether a convolution with a weight of this shape is a linear layer over pixels."""
        return all(size == 1 for size in (*weight[2:], *self.stride)) and not any(self.padding)

    def output_size(self, spatial: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """The spatial dimensions of the result, from those of the input and of the weight."""
        return tuple(
            (size + 2 * pad - dil * (taps - 1) - 1) // step + 1
            for size, taps, step, pad, dil in zip(spatial, kernel, *self, strict=True)
        )
