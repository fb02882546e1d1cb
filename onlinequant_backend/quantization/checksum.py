"""Checksums of all bytes of a tensor, computed where the tensor is."""

from __future__ import annotations

import functools

import torch

from ..tensors import extent
from .host_weights import is_plain

# Words in a row; as many rows at a time as keep temporary tensors small.
_ROW, _ROWS = 4096, 256
# An odd multiplier makes a one-to-one map of 64-bit numbers (Knuth's MMIX).
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407


def can_be_summed(tensor: torch.Tensor) -> bool:
    """Whether it is a plain tensor without gaps in its memory."""
    return is_plain(tensor) and extent(tensor) == tensor.numel()


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A checksum of all bytes of ``tensor`` and of their order in memory, for tensors that ``can_be_summed``: a 0-d
    int64 on its device, so that several can be fetched at once. Two tensors that differ have the same one by chance
    only, once in 2**32 if all that differs are signs, and once in 2**64 otherwise.
    """
    words = _words(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    weights = _multipliers(_ROW, tensor.device)
    for number, part in enumerate(words.split(_ROW * _ROWS)):
        whole = len(part) // _ROW * _ROW
        sums = part[:whole].view(-1, _ROW).long().mul_(weights).sum(1)
        rest = part[whole:].long().mul_(weights[: len(part) - whole]).sum()
        sums = torch.cat([sums, rest[None]])
        total = (total * _MULTIPLIER + number).add_((sums * _multipliers(_ROWS + 1, tensor.device)[: len(sums)]).sum())
    return total


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as int32, or as uint8 if it does not consist of whole words."""
    flat = tensor.detach()
    flat = flat.permute(sorted(range(flat.dim()), key=flat.stride, reverse=True)).reshape(-1)
    is_whole = flat.nbytes % 4 == 0 and flat.storage_offset() * flat.itemsize % 4 == 0
    return flat.view(torch.int32 if is_whole else torch.uint8)


@functools.cache
def _multipliers(number: int, device: torch.device) -> torch.Tensor:
    """Odd numbers of 64 bits that look random."""
    state, found = number, []
    for _ in range(number):
        state = (state * _MULTIPLIER + _INCREMENT) % 2**64
        found.append((state ^ state >> 33 | 1) - 2**63)
    return torch.tensor(found, dtype=torch.int64, device=device)
