"""Random models with views, duplicates and in-place writes: rewritten, each gives what it gives in float."""

from __future__ import annotations

import linecache
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend.passes import REWRITE
from tests.helpers.graph_probe import GraphProbe, host_precision
from tests.helpers.tiny import noise

INPUTS = {"v0": noise(6, 16), "v1": noise(2, 8, 6, 16)}
VALUES = ("F.silu({})", "F.silu({})", "torch.tanh({})", "{} / 1.0", "{} * 0.5", "F.relu({})", "{}.clone()")
VIEWS = (
    *("{}[:, :4]", "{}.transpose(-1, -2)", "{}.flatten(1)", "{}.chunk(2, 1)[-1]", "{}.detach()", "{}[0]"),
    *("{}[..., ::2]", "{}.contiguous()", "{}.reshape(2, -1)", "{}.unbind(0)[-1]", "{}.view(2, -1)", "{}.squeeze()"),
)
WRITES = ("{}.add_(1.5)", "{}.mul_(-2)", "{} += 1", "{}[..., 0] = 2", "F.relu({}, inplace=True)", "{}.detach()[:1] = 1")
# Each of these was wrong, or could not be called, when passes went by names of views.
SEEDS = (16, 19, 21, 33, 40, 64, 66, 84)
LINEARS = tuple(f"self.linears[{number}]({{}})" for number in range(3))
CONVS = tuple(f"self.convs[{number}]({{}})" for number in range(3))


class Layers(nn.Module):
    """What the random models are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(16, 16) for _ in LINEARS)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in CONVS)
        self.requires_grad_(False)


def random_model(seed: int) -> nn.Module:
    """A model whose ``forward`` belongs to this seed."""
    source = "\n    ".join(["def forward(self, v0, v1):", *statements(random.Random(seed))]) + "\n"
    file, names = f"<random graph {seed}>", {"torch": torch, "F": F}
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # where Dynamo looks for it
    exec(compile(source, file, "exec"), names)
    model: nn.Module = type("Seeded", (Layers,), {"forward": names["forward"]})()
    return model


def statements(choices: random.Random, count: int = 16) -> list[str]:
    """Each is executed here, and left out if it cannot be; the last one returns a result of all of them."""
    known: dict[str, Any] = {"torch": torch, "F": F, "self": Layers()}
    found, values = [f"{name} = {name}.tanh()" for name in INPUTS], list(INPUTS)
    known.update({name: value.tanh() for name, value in INPUTS.items()})
    while len(found) < count:
        name = choices.choice([*values, *[values[-1]] * 3])
        shape = known[name].shape
        layers = LINEARS if shape[-1:] == (16,) and len(shape) < 4 else CONVS if shape[1:2] == (8,) else VALUES
        kind = choices.choice([layers, layers, VALUES, VIEWS, VIEWS, WRITES])
        statement = choices.choice(kind).format(name)
        if kind is not WRITES:
            statement = f"v{len(values)} = {statement}"
        try:
            exec(statement, known)
        except (RuntimeError, IndexError):
            continue
        found.append(statement)
        values += [] if kind is WRITES else [f"v{len(values)}"]
    return [*found, f"return {values[-1]}, torch.stack([{', '.join(f'{value}.mean()' for value in values)}])"]


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_a_rewritten_graph_gives_what_it_gives_in_float(seed: int) -> None:
    model = random_model(seed)
    expected = model(*INPUTS.values())
    probe = GraphProbe(model, *INPUTS.values(), precision=host_precision()).analyze()
    layers = probe.observe()
    probe.run(*REWRITE)
    torch.testing.assert_close(tuple(probe.call_quantized(layers)), expected, atol=0.1, rtol=0.1)
