"""Small models with every kind of layer that matters, and the one model that tests compile for real."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Every candidate is quantized, after two observed calls.
OPTIONS = {
    "precision": "int8",
    "calibration_steps": 2,
    "conv_compute_density_threshold": 0,
    "linear_compute_density_threshold": 0,
}


class Block(nn.Module):
    """A residual block with attention: norm, SiLU, 3x3 convolution, then q, k and v from one tensor."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.conv(F.silu(self.norm(x)))
        rows = x.flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(self.to_q(rows), self.to_k(rows), self.to_v(rows))
        return x + self.to_out(attended).transpose(1, 2).reshape(x.shape)


class Net(nn.Module):
    """A few blocks between a convolution in and a convolution out."""

    def __init__(self, channels: int = 16, blocks: int = 1) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(blocks))
        self.conv_out = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)


def net(seed: int = 0, dtype: torch.dtype = torch.float32, blocks: int = 1) -> Net:
    """A ``Net`` with random weights that need no gradient."""
    torch.manual_seed(seed)
    return Net(blocks=blocks).eval().requires_grad_(False).to(dtype)


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal noise that is the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """``||result - expected|| / ||expected||``."""
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def deltas(model: Net) -> list[tuple[nn.Module, torch.Tensor]]:
    """Changes of some weights that turn the picture into another one, of the same range: channels in other order."""
    block = model.blocks[0]
    return [(layer, layer.weight.flip(0) - layer.weight) for layer in (block.conv, block.to_v, model.conv_in)]
