"""Whether the values of a few tensors on a GPU are beyond known bounds: one kernel and one answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import launch

_BLOCK = 1024
_PROGRAMS = 64  # for each tensor, at most
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@triton.jit(do_not_specialize=["call"])
def _check_kernel(tensors, limits, found, call, BLOCK: tl.constexpr):
    """Writes the number of the call where it finds a value beyond the limits, one of the least magnitude, and one that
    is not zero; so nothing has to be reset before the next call. Ignores values that are not finite."""
    tensor = tl.program_id(0)
    address = tl.load(tensors + 3 * tensor)
    n = tl.load(tensors + 3 * tensor + 1)
    kind = tl.load(tensors + 3 * tensor + 2)
    low = tl.load(limits + 3 * tensor)
    high = tl.load(limits + 3 * tensor + 1)
    least = tl.load(limits + 3 * tensor + 2)
    beyond = tl.zeros([BLOCK], tl.int32)
    large = tl.zeros([BLOCK], tl.int32)
    nonzero = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(1) * BLOCK, n, tl.num_programs(1) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        if kind == 0:
            x = tl.load(address.to(tl.pointer_type(tl.float32)) + i, mask=i < n, other=0)
        elif kind == 1:
            x = tl.load(address.to(tl.pointer_type(tl.float16)) + i, mask=i < n, other=0).to(tl.float32)
        else:
            bits = tl.load(address.to(tl.pointer_type(tl.int16)) + i, mask=i < n, other=0).to(tl.int32) << 16
            x = bits.to(tl.float32, bitcast=True)
        is_counted = (i < n) & (tl.abs(x) < float("inf"))
        beyond |= (is_counted & ((x < low) | (x > high))).to(tl.int32)
        large |= (is_counted & (tl.abs(x) >= least)).to(tl.int32)
        nonzero |= (is_counted & (x != 0)).to(tl.int32)
    place = found + 3 * tensor
    tl.store(place, call, mask=tl.max(beyond) > 0)
    tl.store(place + 1, call, mask=tl.max(large) > 0)
    tl.store(place + 2, call, mask=tl.max(nonzero) > 0)


class BoundsCheck:
    """Checks up to ``count`` tensors on ``device`` at a time. Several threads may use it at once."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count = count
        self._device = device
        self._limits: tuple[Sequence[tuple[float, float, float]], torch.Tensor] | None = None
        self._idle: list[Check] = []

    def begin(self, tensors: Sequence[torch.Tensor | None], limits: Sequence[tuple[float, float, float]]) -> Check:
        """Have the GPU check ``tensors`` when it has done all that it has been given before.

        ``limits``: for each tensor, the least and the greatest value that it may have, and a magnitude that some value
        must have unless all are zero. They are copied only when the sequence is another object.
        """
        with torch.cuda.device(self._device), torch.inference_mode(False):
            known = self._limits
            if known is None or known[0] is not limits:
                known = self._limits = limits, torch.tensor(limits, dtype=torch.float32, device=self._device)
            try:
                check = self._idle.pop()
            except IndexError:
                check = Check(self._count, self._device, self._idle)
            check.begin(tensors, known[1])
        return check


class Check:
    """One check. ``idle``: receives it when its answer has been read."""

    def __init__(self, count: int, device: torch.device, idle: list[Check]) -> None:
        is_gpu = device.type == "cuda"
        self._idle = idle
        self._call = 0
        self._rows: list[tuple[int, int, int]] = []
        self._staged = torch.zeros(count, 3, dtype=torch.int64, device="cpu", pin_memory=is_gpu)
        self._tensors = torch.zeros(count, 3, dtype=torch.int64, device=device)
        self._found = torch.zeros(count, 3, dtype=torch.int32, device=device)
        self._answer = torch.zeros(count, 3, dtype=torch.int32, device="cpu", pin_memory=is_gpu)
        self._answered = torch.cuda.Event() if is_gpu else None
        self._values: list[torch.Tensor | None] = []

    def begin(self, tensors: Sequence[torch.Tensor | None], limits: torch.Tensor) -> None:
        self._call += 1
        self._values = [None if tensor is None else _dense(tensor.detach()) for tensor in tensors]
        rows = [
            (0, 0, 0) if values is None else (values.data_ptr(), values.numel(), _KINDS[values.dtype])
            for values in self._values
        ]
        if rows != self._rows:
            self._rows = rows
            self._staged.copy_(torch.tensor(rows, dtype=torch.int64, device="cpu"))
            self._tensors.copy_(self._staged, non_blocking=True)
        programs = min(_PROGRAMS, triton.cdiv(max(n for _, n, _ in rows), _BLOCK))
        launch(_check_kernel, len(rows), max(1, programs))(self._tensors, limits, self._found, self._call, BLOCK=_BLOCK)
        self._answer.copy_(self._found, non_blocking=True)
        if self._answered is not None:
            self._answered.record()

    def end(self) -> bool:
        """Wait for the answer: whether some tensor is not within its limits."""
        if self._answered is not None:
            self._answered.synchronize()
        call = self._call
        found = [(beyond == call, large == call, other == call) for beyond, large, other in self._answer.tolist()]
        self._values = []
        self._idle.append(self)
        return any(is_beyond or (is_nonzero and not is_large) for is_beyond, is_large, is_nonzero in found)


def _dense(values: torch.Tensor) -> torch.Tensor:
    """The same values, in memory without gaps and of a dtype that the kernel knows."""
    if values.dtype not in _KINDS:
        values = values.float()
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        return values
    return values.contiguous()
