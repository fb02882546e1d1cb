"""A model of three layers, for tests that trace it many times, and what they need around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend import best_effort
from onlinequant_backend.cache import locks
from tests.helpers.tiny import OPTIONS, noise, relative_error

CLOSE = 0.08  # relative error that 8 bits of weights and 7 of activations explain
X, WIDE = noise(1, 4, 8, 8), noise(2, 4, 12, 8)
# Calls observed and whether the cache had something, of a process that calibrates and of one that need not.
MADE, FOUND = (2, False), (0, True)


class Small(nn.Module):
    """A convolution, a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.linear = nn.Linear(16, 16)
        self.conv_out = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.conv_in(x))
        return self.conv_out(self.linear(x.movedim(1, -1)).movedim(-1, 1))


def texts_into(told: list[str]) -> Callable[[oq.Update], None]:
    """A listener that adds the text of each update to ``told``."""
    return lambda update: told.append(update.text)


def small(seed: int = 0) -> Small:
    """A ``Small`` with random weights that need no gradient."""
    torch.manual_seed(seed)
    return Small().eval().requires_grad_(False)


def fused(model: Small) -> dict[str, torch.Tensor]:
    """Weights, by name, of a LoRA: another picture, from activations of about the same size."""
    return {"linear.weight": -model.linear.weight, "conv_out.weight": model.conv_out.weight.flip(0)}


def compiled(model: nn.Module, options: Mapping[str, Any] | None = None, **more: Any) -> Callable[..., torch.Tensor]:
    return torch.compile(model, backend=oq.onlinequant, options={**OPTIONS, **(options or {}), **more})


@torch.no_grad()
def run(model: nn.Module, x: torch.Tensor = X, options: Mapping[str, Any] | None = None) -> oq.Report:
    """Call a model until it is in 8 bit; what it computes on the way is right."""
    step, expected = compiled(model, options), model(x)
    pictures = [step(x) for _ in range(4)]
    assert all(torch.equal(picture, expected) or relative_error(picture, expected) < CLOSE for picture in pictures)
    assert not torch.equal(pictures[-1], expected)
    assert oq.reports()[-1].phase == "quantized", oq.reports()[-1].phase_reason
    return oq.reports()[-1]


def outcome(report: oq.Report) -> tuple[int, bool]:
    """See ``MADE`` and ``FOUND``."""
    return report.calls_observed, report.cache_hit


def cache_directory() -> Path:
    """The directory that ``conftest.py`` has given to this test."""
    return Path(os.environ["ONLINEQUANT_CACHE_DIR"]).resolve()


def entries() -> list[Path]:
    """The folders of all entries."""
    return sorted(cache_directory().glob("entries/*"))


def is_locked() -> bool:
    """Whether this process holds any lock."""
    return any(map(locks.is_held_here, cache_directory().glob("locks/*")))


def forget_everything() -> None:
    """Let this process go on as a new one would."""
    oq.reset()
    torch._dynamo.reset()
    best_effort.forget()
