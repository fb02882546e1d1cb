"""A checksum depends on every byte of a tensor and on where it is."""

from __future__ import annotations

import pytest
import torch

from onlinequant_backend.quantization import checksum as module
from onlinequant_backend.quantization.checksum import can_be_summed, checksum

ROW, ROWS = module._ROW, module._ROWS
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def values(number: int, dtype: torch.dtype) -> torch.Tensor:
    bits = torch.randint(0, 256, (number * dtype.itemsize,), generator=torch.Generator().manual_seed(0))
    return bits.to(torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [1, 3, 4, ROW - 1, 4 * ROW + 4, ROW * ROWS + 12, 2 * ROW * ROWS + 5])
def test_each_bit_counts(number: int, dtype: torch.dtype) -> None:
    tensor = values(number, dtype)
    found = {int(checksum(tensor))}
    places = sorted({0, number // 3, number // 2, number - 1})
    for at in places:
        changed = tensor.clone()
        changed.view(torch.uint8)[at * dtype.itemsize] ^= 0x80
        found.add(int(checksum(changed)))
    assert len(found) == 1 + len(places)
    assert int(checksum(tensor.clone())) == int(checksum(tensor))


def test_the_order_counts() -> None:
    tensor = values(3 * ROW * ROWS, torch.float32)
    parts = tensor.view(torch.int32).view(3, ROWS, ROW)
    orders = (parts, parts.flip(0), parts.flip(1), parts.flip(2))
    assert len({int(checksum(order.contiguous())) for order in orders}) == 4


def test_signs_count() -> None:
    tensor = values(ROW, torch.bfloat16)
    assert len({int(checksum(each)) for each in (tensor, -tensor, torch.cat([-tensor[:2], tensor[2:]]))}) == 3


def test_it_is_taken_in_the_order_of_the_memory() -> None:
    tensor = torch.randn(8, 4, 3, 3)
    last = tensor.to(memory_format=torch.channels_last)
    assert int(checksum(last)) == int(checksum(last.permute(0, 2, 3, 1).contiguous())) != int(checksum(tensor))


def test_gaps_and_special_tensors_are_refused() -> None:
    tensor = torch.randn(4, 8)
    assert can_be_summed(tensor) and can_be_summed(torch.nn.Parameter(tensor)) and can_be_summed(tensor.t())
    assert not can_be_summed(tensor[:, ::2]) and not can_be_summed(tensor.to("meta"))


def test_a_part_that_does_not_begin_with_a_word_is_summed() -> None:
    tensor = torch.randn(9).to(torch.bfloat16)
    assert int(checksum(tensor[1:])) != int(checksum(tensor[:8]))
