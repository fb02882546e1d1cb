"""Models with attention that kernels on GPUs, and their emulation, compute in 8 bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend.graph.attention_info import AttentionInfo, attention_nodes
from onlinequant_backend.kernels.precision import Precision
from tests.helpers.graph_probe import SYMMETRIC, GraphProbe
from tests.helpers.tiny import noise

HEADS, SIZE = 4, 16
X, CONTEXT = noise(2, 128, HEADS * SIZE), noise(2, 70, HEADS * SIZE, seed=2)


class Attending(nn.Module):
    """Attention as diffusers has it, whose arguments are ``keywords``."""

    def __init__(self, heads: int = HEADS, **keywords: Any) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.heads, self.keywords = heads, keywords

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(value).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, value in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        y = F.scaled_dot_product_attention(q, k, v, **self.keywords)
        return self.to_out(y.transpose(1, 2).flatten(2))


class Twice(nn.Module):
    """A module with attention, called two times, in a module of another name."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attending(**keywords).requires_grad_(False)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.attn(self.attn(x, x), context)


def probe_of(model: Callable[..., Any], *inputs: Any, precision: Precision = SYMMETRIC[1], **more: Any) -> GraphProbe:
    return GraphProbe(model, *(inputs or (X, CONTEXT)), precision=precision, **more).analyze()


def attention(probe: GraphProbe) -> list[AttentionInfo]:
    return [info for _, info in attention_nodes(probe.graph_module)]
