"""Operands for which attention is no average of everything, and the error of its result."""

from __future__ import annotations

import math

import torch

from onlinequant_backend.kernels import reference


def operands(
    queries: int, tokens: int, size: int, device: str, dtype: torch.dtype = torch.float16, outliers: float = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries that look for a few directions, keys that have them, values that go with these: [2, 3, tokens, size], as
    a linear layer gives them. ``outliers``: added to every fourth channel of all keys."""
    torch.manual_seed(0)
    themes, contents = torch.randn(2, 6, 3, size) / torch.tensor([0.7, 1.0])[:, None, None, None]

    def about(rows: int, means: torch.Tensor, noise: float) -> torch.Tensor:
        torch.manual_seed(rows)  # keys and values are about the same
        return means[torch.randint(6, (2, rows))] + noise * torch.randn(2, rows, 3, size)

    k, v = about(tokens, themes, 0.5), about(tokens, contents, 0.5)
    k[..., ::4] += outliers
    q = about(queries, themes, 0.5)
    return tuple(x.to(device, dtype).transpose(1, 2) for x in (q, k, v))  # type: ignore[return-value]


def error(actual: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Relative to float64."""
    expected = reference.attention(q, k, v, 1 / math.sqrt(q.shape[-1]))
    return float((actual.double() - expected).norm() / expected.norm())
