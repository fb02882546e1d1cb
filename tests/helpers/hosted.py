"""Host weights without a GPU: the CPU takes its place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from onlinequant_backend.quantization import host_weights


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU reads weights of any size from the host, as a GPU does."""
    monkeypatch.setattr(host_weights, "supports", lambda device: device.type == "cpu")
    monkeypatch.setattr(host_weights, "_LEAST", 0)


def on_host(model: torch.nn.Module) -> set[str]:
    """The names of the weights that are on the host."""
    return set(_names(model))


def _names(model: torch.nn.Module) -> Iterator[str]:
    for name, weight in model.named_parameters():
        if host_weights.is_on_host(weight):
            yield name
