"""What the attention kernel in Gluon does wrong, on a Hopper GPU: one property at a time, each in several runs.

    python benchmarks/gluon_attention_check.py

- "ones": values are all 1, so that results are 1 whatever the weights: sums and totals.
- "average": queries are 0, so that each result is the mean of all values: reading values.
- "chosen": each query is far nearest to one key, and the value of token t is t in all channels, so that a result names
  the token that was read: the order of weights, values and scores. The first queries are printed.
- "equal": how many of the results of two runs are the same, bit by bit; less than all is a race.
- "error": relative, of operands with a structure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.gluon_attention import gluon_attention
from benchmarks.gpu_attention import Operands, Shape, operands
from benchmarks.gpu_timing import require_cuda
from benchmarks.models import relative_error
from onlinequant_backend.kernels import reference

SHAPES = (
    Shape("one block", 1, 1, 64, 128, 128),
    Shape("two groups", 1, 1, 128, 128, 128),
    Shape("blocks", 1, 1, 128, 512, 128),
    Shape("a tail", 1, 1, 128, 97, 128),
    Shape("small heads", 1, 1, 128, 512, 64),
    Shape("many", 2, 10, 4096, 4096, 64),
)


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What the kernel gives for [batch, heads, tokens, size]; where it writes nothing, NaN."""
    batch, heads, queries, size = q.shape
    out = torch.full((batch, queries, heads, size), float("nan"), dtype=q.dtype, device=q.device)
    gluon_attention(q, k, v, size**-0.5, out)
    return out.transpose(1, 2)


def chosen(shape: Shape, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that queries read, and those that they should."""
    q, k, v = given
    tokens = torch.arange(shape.tokens, device=q.device)
    wanted = (7 * torch.arange(shape.queries, device=q.device) + 3) % shape.tokens
    keys = torch.nn.functional.normalize(torch.randn_like(k[:1, :1], dtype=torch.float32), dim=-1).to(k.dtype)
    named = (tokens / shape.tokens).to(v.dtype)[None, None, :, None].expand_as(v[:1, :1]).contiguous()
    found = run((60 * keys[:, :, wanted]).contiguous(), (8 * keys).contiguous(), named)
    return (found.float() * shape.tokens).mean(-1)[0, 0], wanted


@torch.no_grad()
def check(shape: Shape) -> Iterator[str]:
    """The columns of one shape."""
    q, k, v = given = operands(shape, "cuda")
    yield f"{float((run(q, k, torch.ones_like(v)).float() - 1).abs().max()):.3g}"
    average = v.float().mean(2, keepdim=True).expand(-1, -1, shape.queries, -1)
    yield f"{relative_error(run(torch.zeros_like(q), k, v).float(), average):.3g}"
    found, wanted = chosen(shape, given)
    yield " ".join(f"{token:.1f}/{right}" for token, right in zip(found[:5].tolist(), wanted[:5].tolist(), strict=True))
    yield f"{float((run(*given) == run(*given)).float().mean()):.1%}"
    expected = reference.attention(q[:1, :, :256], k[:1], v[:1], shape.size**-0.5).float()
    yield f"{relative_error(run(*given)[:1, :, :256].float(), expected):.3g}"


def main() -> None:
    require_cuda()
    table = Table(title=f"Attention in Gluon, {torch.cuda.get_device_name()}")
    for heading in ("", "ones", "average", "chosen: found/right", "equal", "error"):
        table.add_column(heading)
    for shape in SHAPES:
        try:
            table.add_row(str(shape), *check(shape))
        except RuntimeError as error:  # nothing runs after an illegal access
            table.add_row(str(shape), str(error).splitlines()[0])
            break
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
