"""Host weights without a GPU: the CPU takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from onlinequant_backend.quantization import host_weights


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU reads weights of any size from the host, as a GPU does. Memory that weights leave is kept: nobody can
    wait for an operation of another thread that reads it, as one waits for a GPU's kernels."""
    left: list[torch.Tensor] = []

    def keeping(move: Callable[[Sequence[torch.Tensor]], int]) -> Callable[[Sequence[torch.Tensor]], int]:
        def keep_and_move(weights: Sequence[torch.Tensor]) -> int:
            left.extend(weight.data for weight in weights)
            return move(weights)

        return keep_and_move

    monkeypatch.setattr(host_weights, "supports", lambda device: device.type == "cpu")
    monkeypatch.setattr(host_weights, "_LEAST", 0)
    for name in ("move_to_host", "move_to_device"):
        monkeypatch.setattr(host_weights, name, keeping(getattr(host_weights, name)))


def on_host(model: torch.nn.Module) -> set[str]:
    """The names of the weights that are on the host."""
    return set(_names(model))


def _names(model: torch.nn.Module) -> Iterator[str]:
    for name, weight in model.named_parameters():
        if host_weights.is_on_host(weight):
            yield name
