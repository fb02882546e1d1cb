"""A model whose cross-attention has one key: what is rewritten exactly, and a LoRA in weights that nothing reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import onlinequant_backend as oq
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.small import CLOSE, compiled
from tests.helpers.tiny import noise, relative_error

X, CONTEXT = noise(2, 9, 16), noise(2, 1, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.before, self.after = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.to_q, self.to_k, self.to_v = nn.Linear(16, 16), nn.Linear(8, 16), nn.Linear(8, 16)
        self.to_out = nn.Linear(16, 16)
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        attended = F.scaled_dot_product_attention(self.to_q(self.norm(x)), self.to_k(context), self.to_v(context))
        return self.after(F.silu(x + self.to_out(attended)))


@torch.no_grad()
@pytest.mark.parametrize("where", ["to_q", "to_v", "before"])
def test_a_lora_in_any_weight_keeps_the_calibration(where: str, inductor: EagerInductor) -> None:
    torch.manual_seed(0)
    model = Model()
    step = compiled(model, exclude=("after",), drift_check_every=0)
    step(X, CONTEXT), step(X, CONTEXT)
    for _ in range(2):
        model.get_submodule(where).weight.mul_(1.01)
        for _ in range(3):
            assert relative_error(step(X, CONTEXT), model(X, CONTEXT)) < CLOSE
            assert oq.reports()[-1].phase != "calibrating"
    report = oq.reports()[-1]
    assert report.phase == "quantized"
    assert {decision.name for decision in report.decisions} == {"before", "to_v", "to_out", "after"}
