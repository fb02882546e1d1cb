from __future__ import annotations

import pytest
import torch

from onlinequant_backend.tensors import sample
from tests.helpers.tiny import noise


@pytest.mark.parametrize(
    "tensor",
    [
        noise(64, 32),
        noise(64, 32).t(),
        noise(32, 16, 3, 3).to(memory_format=torch.channels_last),
        noise(16, 8, 3, 3, 3).to(memory_format=torch.channels_last_3d),
        noise(7),
        torch.tensor(1.0),
        torch.nn.Parameter(noise(3, 1, 5)),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.stride()}",
)
def test_dense_memory_is_viewed_not_copied(tensor: torch.Tensor) -> None:
    """A copy of every channels-last weight cost SD1.5 three seconds before its first step in 8 bit."""
    for number in (1, 16, 10**6):
        values = sample(tensor, number)
        assert (values.dim(), values.requires_grad) == (1, False)
        assert 1 <= len(values) <= number
        assert values.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_values_are_spread_over_all_channels() -> None:
    channels = torch.arange(64.0).expand(100, 64).contiguous()
    assert len(sample(channels, 1000).unique()) == 64


def test_memory_with_gaps() -> None:
    assert sample(torch.arange(10.0)[::2], 10).tolist() == [0, 2, 4, 6, 8]


def test_empty() -> None:
    assert sample(torch.empty(0, 3), 8).tolist() == []
