"""Batches of scenes to train on, drawn on the device as they are needed, and the time there is for it."""

from __future__ import annotations

import time

import torch

from onlinequant_backend.progress import Progress
from onlinequant_backend.scenes.model import tokenize
from onlinequant_backend.scenes.scene import caption, codes, draw_codes, every_scene, is_held_out


class Scenes:
    """All scenes that may be trained on, as captions and as the numbers that pictures are drawn from."""

    def __init__(self, device: torch.device, seed: int) -> None:
        with Progress("listing scenes"):
            shown = [scene for scene in every_scene() if not is_held_out(caption(scene))]
            self.codes = codes(shown).to(device)
            self.tokens = tokenize([caption(scene) for scene in shown]).to(device)
        has_two = self.codes[:, 5] >= 0
        self.one, self.two = (~has_two).nonzero()[:, 0], has_two.nonzero()[:, 0]
        self.generator = torch.Generator(device).manual_seed(seed)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures [size, 3, 64, 64], their captions' tokens and their codes."""
        chosen = self.choose(size)
        return draw_codes(self.codes[chosen], self.generator), self.tokens[chosen], self.codes[chosen]

    def choose(self, size: int) -> torch.Tensor:
        """Indices of ``size`` random scenes, int64; of two things twice as often as of one."""

        def draw_from(rows: torch.Tensor) -> torch.Tensor:
            return rows[torch.randint(len(rows), (size,), generator=self.generator, device=rows.device)]

        is_one = torch.rand(size, generator=self.generator, device=self.one.device) < 1 / 3
        return torch.where(is_one, draw_from(self.one), draw_from(self.two))


class Clock:
    """Counts from when it is made."""

    def __init__(self, minutes: float) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        """How much of the time is over, [0, 1]."""
        return min(self.elapsed / self.seconds, 1)
