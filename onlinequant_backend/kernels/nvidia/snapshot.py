"""Whether any of many values, scattered over a GPU's memory, has changed: one kernel and one answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import launch

_BLOCK = 256
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _compare_kernel(addresses, expected, changed, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    address = tl.load(addresses + i, mask=i < n, other=0)
    known = tl.load(expected + i, mask=i < n, other=0)
    value = tl.load(address.to(tl.pointer_type(expected.dtype.element_ty)), mask=i < n, other=0)
    tl.store(changed + tl.zeros_like(i), 1, mask=(i < n) & (value != known))


class Samples:
    """A snapshot of ``views``, of one dtype and on one GPU, that must live for as long as this does."""

    def __init__(self, views: Sequence[torch.Tensor]) -> None:
        device, size = views[0].device, views[0].element_size()
        self._expected = torch.cat([view.flatten() for view in views]).view(_BITS[size])
        offsets = [
            view.data_ptr() + size * i * (view.stride(0) if view.dim() else 0)
            for view in views
            for i in range(view.numel())
        ]
        self._addresses = torch.tensor(offsets, dtype=torch.int64, device=device)
        self._changed = torch.zeros(1, dtype=torch.int32, device=device)
        self._answer = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self._answered = torch.cuda.Event() if device.type == "cuda" else None

    def begin(self) -> None:
        """Have the GPU compare when it gets there, after all that it has been given before."""
        n = len(self._addresses)
        with torch.cuda.device(self._changed.device):
            launch(_compare_kernel, triton.cdiv(n, _BLOCK))(
                self._addresses, self._expected, self._changed, n, BLOCK=_BLOCK
            )
            self._answer.copy_(self._changed, non_blocking=True)
            if self._answered is not None:
                self._answered.record()

    def end(self) -> bool:
        """Wait for the answer: whether any value was another one, be it by a bit."""
        if self._answered is not None:
            self._answered.synchronize()
        return bool(self._answer)

    def have_changed(self) -> bool:
        """``begin`` and ``end``."""
        self.begin()
        return self.end()
