"""The 8-bit number formats: how activations and weights are stored."""

from __future__ import annotations

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store activations and weights in 8 bit.

    Attributes:
        name: of its own, for keys.
        activation: dtype of activations. uint8 has a zero point; int8 and float8 are symmetric.
        weight: dtype of weights, which are always symmetric.
        weight_limit: largest magnitude of a stored weight.
        headroom: what observed ranges are widened by before they are laid onto the format's.
        linear_per_tensor: whether a linear weight has one scale instead of one for each output channel: cuBLAS is fast
            with these only, and a floating format loses nothing by it.
    """

    name: str
    activation: torch.dtype
    weight: torch.dtype
    weight_limit: float
    headroom: float = 1
    linear_per_tensor: bool = False

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

    @property
    def is_packed(self) -> bool:
        """Whether weights live behind a handle, in oneDNN's own layout."""
        return self.activation is torch.uint8


# Of stored activations, and what NaN and infinity are stored as: they must not pass for numbers.
LIMITS = {torch.uint8: (0.0, 254.0), torch.int8: (-127.0, 127.0), torch.float8_e4m3fn: (-448.0, 448.0)}
NOT_FINITE = {torch.uint8: 255.0, torch.int8: -128.0, torch.float8_e4m3fn: math.nan}

# Integers leave the code at each limit to what lies beyond a range: without it, nothing would tell an input whose
# values pile up at the end of its range from one that is clipped. Half a step rounds to a limit, rounding the zero
# point moves a range by up to another half, and results may come out a little larger than they should.
_MARGIN = 1.125

ONEDNN = Format("onednn", torch.uint8, torch.int8, 127)
# For CPUs without VNNI or AMX, whose multiply-add sums two products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 would
# saturate. Weights spread more evenly over their range than activations do, so they can better spare the bit.
ONEDNN_7 = Format("onednn 7-bit weights", torch.uint8, torch.int8, 63)
INT8 = Format("int8", torch.int8, torch.int8, 127)
# A floating format rounds small and large numbers alike: half of its range kept free costs next to nothing, and an
# activation that grows beyond what was observed, by a LoRA or another prompt, is not clipped.
FP8 = Format("fp8", torch.float8_e4m3fn, torch.float8_e4m3fn, 448, headroom=2, linear_per_tensor=True)
