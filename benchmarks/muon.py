"""An optimizer for what `train_scenes.py` trains: it needs a fraction of the pictures that AdamW needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_MOMENTUM, _DECAY = 0.95, 0.01
_STEPS, _COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all made about 1, for the weights of linear layers and convolutions.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaled to AdamW's size of steps as
    in Liu et al., "Muon is scalable for LLM training", 2025, so that one learning rate serves both. A convolution's
    weight counts as a matrix of its output channels. (``torch.optim.Muon`` takes matrices alone.)
    """

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], self.state[parameter])

    @staticmethod
    def _update(parameter: torch.Tensor, lr: float, state: dict[str, Any]) -> None:
        if "mean" not in state:
            state["mean"] = torch.zeros_like(parameter)
        mean = state["mean"]
        mean.lerp_(parameter.grad, 1 - _MOMENTUM)
        direction = orthogonalized(torch.lerp(parameter.grad, mean, _MOMENTUM).flatten(1))
        parameter.mul_(1 - lr * _DECAY)
        parameter.add_(direction.view(parameter.shape), alpha=-0.2 * lr * max(direction.shape) ** 0.5)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` [M, N] with singular values of about 1, by a Newton-Schulz iteration."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    first, third, fifth = _COEFFICIENTS
    for _ in range(_STEPS):
        square = x @ x.T
        x = first * x + (third * square + fifth * square @ square) @ x
    return x.T if is_tall else x
