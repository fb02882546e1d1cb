"""Whether a call's inputs differ in size from those before: where they do, activations usually do too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..best_effort import best_effort
from .drift import bounds

if TYPE_CHECKING:
    from ..kernels.nvidia.bounds_check import BoundsCheck

# Share of the distance between minimum and maximum: the maximum of small normal noise tensors varies by a fifth.
_GROWTH = 0.25
# Inputs smaller than any before by this factor count as far smaller.
_DECLINE = 8


class Limits(NamedTuple):
    """What is expected of an input: values from ``low`` to ``high``, and one of magnitude ``least`` unless all are
    zero."""

    low: float
    high: float
    least: float


class Extents:
    """The bounds of a graph's inputs so far.

    ``positions``: of the inputs among a call's arguments.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        # By position: minimum and maximum over all calls, and the least of the calls' largest magnitudes.
        self._known = dict.fromkeys(positions, (0.0, 0.0, math.inf))
        self._limits = list(map(_limits, self._known.values()))
        self._checks: dict[torch.device, BoundsCheck] = {}

    def have_changed(self, args: Sequence[Any]) -> bool:
        """Whether an input exceeds its earlier bounds by far, or is far smaller than in every earlier call."""
        changed = False
        for (position, known), x in zip(self._known.items(), self._floats(args), strict=True):
            if x is None:
                continue
            (low, high, peak), limits = known, _limits(known)
            new_low, new_high = bounds(x)
            new_peak = max(-new_low, new_high)
            if not 0 < new_peak < math.inf:
                continue
            if new_low < limits.low or limits.high < new_high or new_peak < limits.least:
                self._known[position] = min(low, new_low), max(high, new_high), min(peak, new_peak)
                changed = True
        if changed:
            self._limits = list(map(_limits, self._known.values()))
        return changed

    def are_late(self, device: torch.device) -> bool:
        """Whether a caller had to wait for the device to learn the bounds of its inputs."""
        return device.type == "cuda"

    def begin(self, args: Sequence[Any], device: torch.device) -> Callable[[], bool]:
        """Returns a function for ``have_changed``. On a GPU it waits only for what the GPU has been given before this
        call, unless inputs have changed."""
        if not self.are_late(device):
            return lambda: self.have_changed(args)
        inputs = [x if x is not None and x.device == device else None for x in self._floats(args)]
        if all(x is None for x in inputs):
            return lambda: False
        with best_effort("the inputs of a step cannot be compared with those before"):
            check = self._check(device).begin(inputs, self._limits)
            return lambda: check.end() and self.have_changed(args)
        return lambda: False

    def _floats(self, args: Sequence[Any]) -> list[torch.Tensor | None]:
        """The inputs that are floating-point tensors, None in the place of others."""
        inputs = (args[position] for position in self._known)
        return [x if isinstance(x, torch.Tensor) and x.is_floating_point() else None for x in inputs]

    def _check(self, device: torch.device) -> BoundsCheck:
        if device not in self._checks:
            from ..kernels.nvidia.bounds_check import BoundsCheck  # needs Triton

            self._checks[device] = BoundsCheck(len(self._known), device)
        return self._checks[device]


def _limits(known: tuple[float, float, float]) -> Limits:
    low, high, peak = known
    margin = _GROWTH * (high - low)
    return Limits(low - margin, high + margin, peak / _DECLINE)
