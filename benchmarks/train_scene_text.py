"""Teaches the text encoder of `train_scenes.py` what captions say, before there is a denoiser to learn from.

A latent diffusion model starts from a text encoder that was trained before, too. Without that, text states and the
attention to them have to wait for each other.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.scene_batches import Scenes
from benchmarks.train_scene_features import answers
from onlinequant_backend.progress import Progress
from onlinequant_backend.scenes.features import ANSWERS
from onlinequant_backend.scenes.model import TextEncoder
from onlinequant_backend.scenes.scene import PLACES

_STEPS, _BATCH, _PEAK_RATE = 1500, 64, 3e-3


class _Reader(nn.Module):
    """Answers the questions of ``ANSWERS`` from text states, as a denoiser reads them: one query for each place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.1 * torch.randn(1 + len(PLACES), width))
        self.background = nn.Linear(width, ANSWERS[0])
        self.place = nn.Linear(width, sum(ANSWERS[1:4]))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [N, sum(ANSWERS)] of states [N, T, W]."""
        weights = (states @ self.queries.T / states.shape[-1] ** 0.5).softmax(1)
        read = weights.mT @ states
        return torch.cat([self.background(read[:, 0]), self.place(read[:, 1:]).flatten(1)], 1)


def train_text(text: TextEncoder, scenes: Scenes) -> float:
    """Train ``text`` in place, and return the share of right answers in the last batch."""
    device = text.positions.device
    reader = _Reader(text.positions.shape[1]).to(device)
    optimizer = torch.optim.AdamW([*text.parameters(), *reader.parameters()])
    right = 0.0
    with Progress("training the text encoder", _STEPS) as progress:
        for step in range(1, _STEPS + 1):
            optimizer.param_groups[0]["lr"] = _PEAK_RATE * (0.5 + 0.5 * math.cos(math.pi * step / _STEPS))
            chosen = scenes.choose(_BATCH)
            logits = reader(text(scenes.tokens[chosen])).split(ANSWERS, dim=1)
            wanted = answers(scenes.codes[chosen]).unbind(1)
            loss = torch.stack([F.cross_entropy(*pair) for pair in zip(logits, wanted, strict=True)]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                hits = [(x.argmax(1) == y).float().mean() for x, y in zip(logits, wanted, strict=True)]
                right = torch.stack(hits).mean().item()
                progress.advance(f"right {right:.4f}", to=step)
    return right
