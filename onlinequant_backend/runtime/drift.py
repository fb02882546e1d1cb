"""Drift checks: whether activations still fit the observed ranges, which another LoRA, resolution or sampler may
change. Some calls count, for each 8-bit layer, how many input values lie outside its range and are clipped, and how
much of the range the inputs use. On a GPU these calls have a CUDA graph of their own that includes the counting.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from .sampling import SamplingRun


# Runs of more steps are rare.
_LONGEST_RUN = 64
# Float calls because of the least signs of drift, for each change.
_MOST_DOUBTS = 3
_GOLDEN = (math.sqrt(5) - 1) / 2


class Schedule:
    """Which calls are drift checks: those after a change, and later one of every ``every`` calls; 0 means none. After a
    change every step of a sampling run is checked within two runs: every second step in the first run, the others in
    the second. Where the run of a call is not known, all of the next 64 calls are checked: with fewer, some step of a
    run of some length would stay unchecked for that long. Later the distances between checks are uneven, so that every
    step is checked eventually, whatever the length of the runs.

    Attributes:
        checks: the number of checks so far.
        is_in_doubt: whether the last call passed to ``is_due`` follows a change, by at most two sampling runs, or has
            inputs beyond earlier ones; no longer once ``settle`` was called often enough since the last change. In
            doubt, the least sign of drift counts.
    """

    def __init__(self, every: int) -> None:
        self.checks = 0
        self.is_in_doubt = False
        self._doubts = 0
        self._every = every
        self._is_new = False  # the state at the start has just been observed
        self._checks_all = False  # every call of two runs
        self._calls = 0  # since the last change
        self._runs = 0  # begun since the last change
        self._position = 0  # in the run
        self._run: Callable[[], SamplingRun | None] = lambda: None
        # Calls are divided into windows with one check each.
        self._window = min(8, every)
        self._number = 1  # of the window
        self._left = self._place()

    @property
    def is_on(self) -> bool:
        """Whether any call is ever a check."""
        return bool(self._every)

    def restart(self, checks_all: bool = False, in_float: bool = False) -> None:
        """Something may have changed, so the next call is a check; ``checks_all``: so is every call of two runs;
        ``in_float``: a float call has just included the change, or it is most likely none."""
        self._is_new, self._checks_all = True, checks_all
        self._calls = self._runs = 0
        if not in_float:
            self._doubts = _MOST_DOUBTS

    def doubt(self) -> None:
        """The call has inputs beyond those of all earlier calls."""
        self.is_in_doubt = self._doubts > 0

    def settle(self) -> None:
        """A call in doubt was repeated in float. Inputs that grow at each step would have all of them repeated."""
        self._doubts -= 1

    def is_due(self, run: SamplingRun | None = None, have_changed: bool = False) -> bool:
        """Whether a call is a check; to be called once per call. ``have_changed``: its inputs alone are a reason."""
        if not self.is_on:
            return False
        if run is not self._run():
            self._run = (lambda: None) if run is None else weakref.ref(run)
            self._runs += 1
            self._position = 0
        is_due = self._is_after_change(run is not None) if self._is_new else self._is_in_turn()
        self.is_in_doubt = self._doubts > 0 and (self._is_new or have_changed)
        self._calls += 1
        self._position += 1
        is_due = is_due or have_changed
        self.checks += is_due
        return is_due

    def _is_after_change(self, is_run_known: bool) -> bool:
        if self._runs > 2 if is_run_known else self._calls >= _LONGEST_RUN:
            self._is_new, self._window = False, self._every
            return self._is_in_turn()
        # A run that has begun before the change does not count as one of the two.
        return not is_run_known or self._checks_all or self._calls == 0 or (self._position + self._runs) % 2 == 1

    def _is_in_turn(self) -> bool:
        if self._left > 0:
            self._left -= 1
            return False
        self._left = self._window - 1 - self._place()
        self._window = min(2 * self._window, self._every)
        self._number += 1
        self._left += self._place()
        return True

    def _place(self) -> int:
        """The position of the check in its window. The fractional parts of squares times an irrational number are
        equidistributed, also over every arithmetic progression (Weyl's theorem): each step of a run of any length is
        checked eventually."""
        return int(self._window * (self._number**2 * _GOLDEN % 1))


class Bounds:
    """The bounds of the numbers among a model's inputs so far: activations may grow with each of them.

    Attributes:
        are_known: whether there was a call.
    """

    def __init__(self) -> None:
        self._last: tuple[float, ...] = ()
        self._lowest: tuple[float, ...] | None = None
        self._highest: tuple[float, ...] = ()

    @property
    def are_known(self) -> bool:
        return self._lowest is not None

    def widen(self, numbers: tuple[float, ...]) -> bool:
        """Extend the bounds to the numbers of a call; returns whether that was necessary."""
        if numbers == self._last:
            return False
        self._last = numbers
        before = self._lowest, self._highest
        self._lowest = tuple(map(min, numbers, self._lowest or numbers))
        self._highest = tuple(map(max, numbers, self._highest or numbers))
        return (self._lowest, self._highest) != before


def is_finite(result: Any) -> bool:
    """Whether all floats in the tensors of a result are finite; synchronizes with the device."""
    return all(math.isfinite(bound) for tensor in _floats(result) for bound in bounds(tensor))


def bounds(x: torch.Tensor) -> tuple[float, float]:
    """Minimum and maximum, NaN if any value is; takes a tenth of the time of ``torch.isfinite``."""
    if not x.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(x.detach() if x.itemsize > 1 else x.detach().float())  # float8 has no aminmax
    return float(low), float(high)


def nonfinite_masks(result: Any) -> list[torch.Tensor]:
    """Which floats in the tensors of a result are not finite, tensor by tensor."""
    return [~torch.isfinite(tensor) for tensor in _floats(result)]


def are_same_masks(masks: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    """Whether the non-finite values of two results are at the same positions."""
    return len(masks) == len(other) and all(map(torch.equal, masks, other))


def _floats(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
