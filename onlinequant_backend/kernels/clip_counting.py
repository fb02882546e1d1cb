"""How many of the values that 8-bit layers read lie beyond their ranges, where they are clipped."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ..tensors import sample

# Values that are looked at of each tensor: enough for shares of a thousandth.
SAMPLES = 16384
# A layer has drifted if it clips more than this share of its input beyond so many times what it clipped while it was
# observed: in float, that is. With 8-bit layers before it, an attention's output may clip 4 times as much: one call in
# float shows that its range is right (``Layer.accept``). Of 640 values that are the same in all rows, one is 0.16%.
_TOLERANCE = 0.002
_FACTOR = 2
# So few values beyond a range say nothing in a tensor of a thousand; in one of a dozen each is a large part of it.
_HANDFUL = 4
_HANDFUL_OF = 32  # one in so many
FEW = _HANDFUL * _HANDFUL_OF  # of fewer values each counts
# Values of which none is as many steps away from zero are rounded by so much that it shows.
FEWEST_STEPS = 8
_counting = threading.local()


class Seen(NamedTuple):
    """What a call has seen of one quantized tensor.

    Attributes:
        clipped: the share of values beyond the range.
        lowest, highest: the least and the largest stored value; of float8 both are the largest magnitude.
        handful: the share that so few values are that they say little.
    """

    clipped: float
    lowest: float
    highest: float
    handful: float = 0.0

    @property
    def clipped_of_many(self) -> float:
        """The share of values beyond the range, less a handful."""
        return max(0.0, self.clipped - self.handful)

    @property
    def clipped_in_doubt(self) -> float:
        """The share of values beyond the range, less half a handful: among as many values as were observed, one is
        expected at each end beyond all of them."""
        return max(0.0, self.clipped - self.handful / 2)


class Counts:
    """What one call's layers have read.

    Attributes:
        clipped: of each quantized tensor, by the address of its ``qparams``: ``clipped``.
        bounds: of each, in the same order, the least and the largest stored value as two 0-d tensors of one dtype.
    """

    def __init__(self) -> None:
        self.clipped: dict[int, torch.Tensor] = {}
        self.bounds: list[torch.Tensor] = []

    def see(self, xq: torch.Tensor, qparams: torch.Tensor) -> None:
        """Count in what a layer reads."""
        if qparams.data_ptr() not in self.clipped and xq.numel():
            values = sample(xq, SAMPLES)
            self.clipped[qparams.data_ptr()] = clipped(values)
            self.bounds += _bounds_of(values)


def clipped(values: torch.Tensor) -> torch.Tensor:
    """Which of some quantized values, uint8, int8 or float8_e4m3fn of any shape, are beyond their range, for which the
    code at each limit is kept (``Format.span``), or not finite; bool."""
    if values.dtype is torch.uint8:
        return values + 2 < 3  # a sum of more than 255 begins at 0 again
    if values.dtype is torch.int8:
        return values.view(torch.uint8) + 129 < 3  # -127, -128 and 127
    return values.view(torch.uint8).bitwise_and(0x7F) >= 0x7E


def _bounds_of(values: torch.Tensor) -> list[torch.Tensor]:
    if values.dtype is torch.float8_e4m3fn:  # which has no minimum, and of which the magnitude will do
        largest = values.view(torch.uint8).bitwise_and(0x7F).amax().view(values.dtype).float()
        return [largest, largest]
    return list(torch.aminmax(values))


def seen_in(clipped: torch.Tensor, bounds: torch.Tensor, lengths: Mapping[int, int]) -> dict[int, Seen]:
    """What ``CountingCall`` returns; ``clipped`` and ``bounds`` hold one tensor's after the other."""
    ends = torch.tensor(list(lengths.values()), dtype=torch.int64, device=clipped.device).cumsum(0) - 1
    totals = clipped.cumsum(0, dtype=torch.int32)[ends].tolist()
    counts = [total - before for before, total in itertools.pairwise([0, *totals])]
    return {
        address: Seen(count / length, lowest, highest, min(_HANDFUL, length // _HANDFUL_OF) / length)
        for (address, length), count, (lowest, highest) in zip(
            lengths.items(), counts, bounds.view(-1, 2).tolist(), strict=True
        )
    }


def has_drifted(seen: Seen, expected: float, is_in_doubt: bool = False) -> bool:
    """Whether a layer clips a larger share than was expected. ``is_in_doubt``: after a change a share that is little
    larger counts, too, since it does not say how far beyond the range its values are.
    """
    if is_in_doubt:
        return seen.clipped_in_doubt > expected
    return seen.clipped_of_many > _FACTOR * expected + _TOLERANCE


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Have the 8-bit layers that this thread runs counted."""
    counts = _counting.counts = Counts()
    try:
        yield counts
    finally:
        _counting.counts = None


def counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` whose first operands are ``xq`` and ``qparams``, and which takes part in ``counting``."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        counts = getattr(_counting, "counts", None)
        if counts is not None:
            counts.see(args[0], args[1])
        return kernel(*args)

    return run
