"""The 8-bit number formats: how activations and weights are stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch


@dataclasses.dataclass(frozen=True)
class ScaleDesc:
    """Which values of a weight share one scale.

    Attributes:
        granularity: all ("tensor"), those of an output channel ("channel"), or so many of these in a row ("block").
        block: how many; None for other granularities.
    """

    granularity: Literal["tensor", "channel", "block"]
    block: int | None = None

    def shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a weight of this shape; a block must divide the values of a channel."""
        if self.granularity == "tensor":
            return (1,)
        return (weight[0],) if self.block is None else (weight[0], math.prod(weight[1:]) // self.block)


PER_TENSOR, PER_CHANNEL = ScaleDesc("tensor"), ScaleDesc("channel")


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store activations and weights in 8 bit.

    Attributes:
        name: of its own, for keys.
        activation: dtype of activations. uint8 has a zero point; int8 and float8 are symmetric.
        weight: dtype of weights, which are always symmetric.
        weight_limit: largest magnitude of a stored weight.
        headroom: what observed ranges are widened by before they are laid onto the format's.
        weight_scale: how a weight's scales are spread.
        matrix_scale: the same for linear weights and those of 1x1 convolutions. cuBLAS is fast only with one scale for
            a whole weight, and a floating format loses nothing by it.
        is_packed: whether weights are kept behind a handle, in a layout of the provider's own.
    """

    name: str
    activation: torch.dtype
    weight: torch.dtype
    weight_limit: float
    headroom: float = 1
    weight_scale: ScaleDesc = PER_CHANNEL
    matrix_scale: ScaleDesc = PER_CHANNEL
    is_packed: bool = False

    def scale_of(self, weight: Sequence[int]) -> ScaleDesc:
        """How the scales of a weight of this shape are spread."""
        return self.matrix_scale if math.prod(weight[2:]) == 1 else self.weight_scale

    def scale_shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a weight of this shape."""
        return self.scale_of(weight).shape(weight)

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest stored activation."""
        return LIMITS[self.activation]

    @property
    def span(self) -> tuple[float, float]:
        """Between which stored values, not whole numbers, a range is laid; what lies beyond is stored as a limit."""
        lowest, highest = self.limits
        margin = 0.0 if self.activation.is_floating_point else _MARGIN
        return lowest + margin, highest - margin

    @property
    def step(self) -> float:
        """The least distance between two stored activations."""
        return 2.0**-9 if self.activation.is_floating_point else 1.0


FLOAT = "float"  # the format of attention whose products are in float


def attention_dtype(format: str) -> torch.dtype:
    """What attention multiplies queries and keys in, and in "fp8" also weights and values; those of "int8" are float.
    Raises ValueError for any other format than these two."""
    dtypes = {known.name: known.activation for known in (INT8, FP8)}
    if format not in dtypes:
        raise ValueError(f"attention has the formats {', '.join(dtypes)}, not {format}")
    return dtypes[format]


# Of stored activations, and what NaN and infinity are stored as: they must not pass for numbers.
LIMITS = {torch.uint8: (0.0, 254.0), torch.int8: (-127.0, 127.0), torch.float8_e4m3fn: (-448.0, 448.0)}
NOT_FINITE = {torch.uint8: 255.0, torch.int8: -128.0, torch.float8_e4m3fn: math.nan}

# Integers leave the code at each limit to what lies beyond a range: without it, nothing would tell an input whose
# values pile up at the end of its range from one that is clipped. Half a step rounds to a limit, rounding the zero
# point moves a range by up to another half, and results may come out a little larger than they should.
_MARGIN = 1.125

ONEDNN = Format("onednn", torch.uint8, torch.int8, 127, is_packed=True)
# For CPUs without VNNI or AMX, whose multiply-add sums two products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 would
# saturate. Weights spread more evenly over their range than activations do, so they can better spare the bit.
ONEDNN_7 = Format("onednn 7-bit weights", torch.uint8, torch.int8, 63, is_packed=True)
INT8 = Format("int8", torch.int8, torch.int8, 127)
# A floating format rounds small and large numbers alike: half of its range kept free costs next to nothing, and an
# activation that grows beyond what was observed, by a LoRA or another prompt, is not clipped.
FP8 = Format("fp8", torch.float8_e4m3fn, torch.float8_e4m3fn, 448, headroom=2, matrix_scale=PER_TENSOR)
