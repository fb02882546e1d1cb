"""A compiled function whose calls also count the clipped values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kernels.clip_counting import Seen, counting, seen_in


class CountingCall:
    """A compiled function whose calls also return counts of the inputs of its 8-bit layers. ``graphed``: turns a
    function into one that is replayed as a CUDA graph; None without a GPU.

    Attributes:
        run: the called function, a CUDA graph if there is one.
    """

    def __init__(
        self, function: Callable[..., Any], graphed: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    ) -> None:
        self._function = function
        self.run = self._counted if graphed is None else graphed(self._counted)

    def __call__(self, *args: Any) -> tuple[Any, dict[int, Seen]]:
        """The result, and the counts of each quantized tensor by the address of its ``qparams``. Waits for both."""
        result, found, lengths = self.run(*args)
        return result, {} if found is None else seen_in(found[0], found[1], lengths)

    def _counted(self, *args: Any) -> tuple[Any, tuple[torch.Tensor, torch.Tensor] | None, dict[int, int]]:
        # Returned rather than stored: other threads may call with other sizes, and graph replays run no Python.
        with counting() as counts:
            result = self._function(*args)
        lengths = {address: len(flags) for address, flags in counts.clipped.items()}
        if not lengths:
            return result, None, lengths
        return result, (torch.cat(list(counts.clipped.values())), torch.stack(counts.bounds)), lengths
