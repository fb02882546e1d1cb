"""What a small classifier of scenes sees in pictures, and how far apart two sets of pictures are by that."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES

WEIGHTS = Path(__file__).parent / "features.safetensors"
WIDTH = 32
# How many answers each question has; at every place "nothing" is one of them.
ANSWERS = [len(BACKGROUNDS), *[1 + len(names) for names in (SHAPES, COLOURS, SIZES)] * len(PLACES)]


class Classifier(nn.Module):
    """Answers what the background is, and the shape, colour and size at each place."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 64)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], WIDTH))
        self.head = nn.Linear(WIDTH, sum(ANSWERS))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Logits [N, sum(ANSWERS)] for pictures [N, 3, 64, 64] in [-1, 1]."""
        return self.head(nn.functional.silu(self.body(pictures)))


@torch.no_grad()
def features(pictures: torch.Tensor) -> torch.Tensor:
    """The last hidden layer, float32 [N, 32], for pictures [N, 3, 64, 64] in [-1, 1]; on the CPU."""
    body = _trained().body
    return torch.cat([body(chunk) for chunk in pictures.detach().cpu().float().split(256)])


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between Gaussians fitted to features [N, D] and [M, D]: 0 for the same, and squared as the FID is.

    ``|mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))``, Heusel et al., "GANs Trained by a Two
    Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017. Some hundred pictures are needed at least; fewer
    make it larger, so compare sets of one size. Raises ValueError for fewer than two.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} pictures: a covariance needs at least two")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # The trace of the root is the sum of the roots of the eigenvalues, which a symmetric matrix shares:
    # cov_a^(1/2) cov_b cov_a^(1/2).
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(distance.item(), 0.0)


@functools.cache
def _trained() -> Classifier:
    classifier = Classifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return classifier.eval().requires_grad_(False)
