"""Whether activations have outgrown the ranges that were observed: another LoRA, resolution or sampler may do that.

Every so often a call counts how many of the values that each 8-bit layer reads lie at an end of its range, where larger
ones are clipped. A CUDA graph cannot count, so that call runs without one.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .samples import sample

# Values that are looked at of each tensor: enough for shares of a thousandth.
SAMPLES = 16384
# A layer has drifted if it clips more than this share of its input beyond so many times what it clipped while it was
# observed: in float, that is. With 8-bit layers before it, an attention's output clips up to 4 times as much.
_TOLERANCE = 0.001
_FACTOR = 4
# So few values beyond a range say nothing: in a tensor of a thousand one more may do.
_HANDFUL = 4
# On a GPU each count is three small kernels; one layer in so many keeps them below 0.5% of the time.
_GPU_TURNS = 4

_counting = threading.local()


class Schedule:
    """Which calls count: soon after a change, and then ever more seldom, until it is every ``every``-th; 0 is none.

    Attributes:
        checks: how often it was time.
    """

    def __init__(self, every: int) -> None:
        self.checks = 0
        self._every = every
        # What is new is what has just been observed.
        self._interval = self._wait = min(8, every)

    def restart(self) -> None:
        """Something has changed: the next call counts."""
        self._interval = self._wait = 1

    def is_due(self) -> bool:
        """Asked once for each call."""
        if not self._every:
            return False
        self._wait -= 1
        if self._wait > 0:
            return False
        self._interval = self._wait = min(2 * self._interval, self._every)
        self.checks += 1
        return True


class Counts:
    """What one call's layers have clipped.

    Attributes:
        shares: of each quantized tensor, by the address of its ``qparams``: 0-d float32, the share at the range's ends.
    """

    def __init__(self, turn: int = 0, turns: int = 1) -> None:
        self.shares: dict[int, torch.Tensor] = {}
        self._allowed: list[float] = []
        self._position = turn
        self._turns = turns

    def see(self, xq: torch.Tensor, qparams: torch.Tensor) -> None:
        """Count in what a layer reads, if it is its turn."""
        self._position += 1
        if self._position % self._turns == 0 and qparams.data_ptr() not in self.shares:
            self.shares[qparams.data_ptr()] = clipped_share(xq, qparams)
            self._allowed.append(_HANDFUL / min(xq.numel(), SAMPLES))

    def by_address(self) -> dict[int, float]:
        """The same as numbers, in one copy from the device, less what a handful of values may be."""
        if not self.shares:
            return {}
        shares = torch.stack(list(self.shares.values())).tolist()
        beyond = (max(0.0, share - allowed) for share, allowed in zip(shares, self._allowed, strict=True))
        return dict(zip(self.shares, beyond, strict=True))


def clipped_share(xq: torch.Tensor, qparams: torch.Tensor) -> torch.Tensor:
    """The share of quantized values, uint8, int8 or float8_e4m3fn of any shape, at an end of their range; 0-d float32.

    Where the zero point is 0, the lower end of uint8 is what zeros are stored as, so it does not count.
    """
    values = sample(xq, SAMPLES)
    if xq.dtype is torch.uint8:
        clipped = values + 1 < 2 if qparams[1] > 0 else values == 255
    elif xq.dtype is torch.int8:
        clipped = values.abs() >= 127
    else:
        clipped = values.view(torch.uint8).bitwise_and(0x7F) >= 0x7E
    return clipped.float().mean()


def has_drifted(share: float, expected: float) -> bool:
    """Whether a layer clips more than it did while it was observed."""
    return share > _FACTOR * expected + _TOLERANCE


@contextlib.contextmanager
def counting(turn: int, device: torch.device) -> Iterator[Counts]:
    """Have the 8-bit layers that this thread runs counted."""
    counts = _counting.counts = Counts(turn, _GPU_TURNS) if device.type == "cuda" else Counts()
    try:
        yield counts
    finally:
        _counting.counts = None


def counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` whose first operands are ``xq`` and ``qparams``, and which takes part in ``counting``."""

    @functools.wraps(kernel)
    def run(xq: torch.Tensor, qparams: torch.Tensor, *rest: Any, **named: Any) -> Any:
        counts = getattr(_counting, "counts", None)
        if counts is not None:
            counts.see(xq, qparams)
        return kernel(xq, qparams, *rest, **named)

    return run


def is_finite(result: Any) -> bool:
    """Whether all floats in the tensors of a result are finite; waits for them."""
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
