from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from torch import nn

from onlinequant_backend.passes.name_layers import name_layers
from tests.helpers.graph_probe import GraphProbe, WithWeight
from tests.helpers.tiny import noise


class Nested(nn.Module):
    """Layers in every kind of container that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 1))
        self.blocks = nn.ModuleList([nn.ModuleDict({"to-q": nn.Linear(6, 6)}), nn.Sequential(nn.Linear(6, 6))])
        self.inner = WithWeight(F.linear, 6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.inner(self.blocks[1](self.blocks[0]["to-q"](x)))  # type: ignore[index]


def names_of_matrices(module: nn.Module) -> list[str]:
    return [name.removesuffix(".weight") for name, value in module.named_parameters() if value.dim() > 1]


def test_names_are_those_of_the_parameters() -> None:
    module = Nested()
    probe = GraphProbe(module, noise(1, 3, 6, 6))
    assert probe.run(name_layers) == {"name_layers": 5}
    assert [info.name for info in probe.infos] == names_of_matrices(module)
    assert [info.kind for info in probe.infos] == ["conv", "conv", "linear", "linear", "linear"]
    for info in probe.infos:
        weight = probe.inputs[info.weight]
        assert weight is dict(module.named_parameters())[f"{info.name}.weight"]
    assert probe.after == probe.before
    probe.assert_settled(name_layers)


def test_names_in_a_diffusers_block() -> None:
    block = CrossAttnDownBlock2D(
        in_channels=8,
        out_channels=8,
        temb_channels=8,
        num_attention_heads=2,
        cross_attention_dim=8,
        resnet_groups=4,
        use_linear_projection=True,
    ).eval()
    probe = GraphProbe(block, noise(1, 8, 8, 8), noise(1, 8), noise(1, 5, 8))
    probe.run(name_layers)
    names = [info.name for info in probe.infos]
    assert sorted(names) == sorted(names_of_matrices(block))
    assert "attentions.0.transformer_blocks.0.attn2.to_out.0" in names


def test_compiled_submodule_leaves_no_trace_in_names() -> None:
    plain = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))
    names = names_of_matrices(plain)
    compiled: Any = torch.compile(plain[1])
    plain[1] = compiled
    probe = GraphProbe(plain, noise(2, 6))
    probe.run(name_layers)
    assert [info.name for info in probe.infos] == names == ["0", "1.0"]


def test_module_that_is_called_twice_has_one_name() -> None:
    linear = nn.Linear(6, 6)
    probe = GraphProbe(nn.Sequential(linear, nn.SiLU(), linear), noise(2, 6))
    assert probe.run(name_layers) == {"name_layers": 2}
    assert [info.name for info in probe.infos] == ["0", "0"]


@pytest.mark.parametrize("cast", [lambda w: w.to(torch.bfloat16), lambda w: w.half().float(), lambda w: w.bfloat16()])
def test_cast_of_a_weight_is_looked_through(cast: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module = nn.Sequential(WithWeight(lambda x, w: F.linear(x.to(cast(w).dtype), cast(w)), 6, 6))
    probe = GraphProbe(module, noise(2, 6))
    probe.run(name_layers)
    assert (probe.info.name, probe.inputs[probe.info.weight] is module[0].weight) == ("0", True)


def test_computed_weight_takes_the_name_of_its_module() -> None:
    probe = GraphProbe(nn.Sequential(nn.SiLU(), WithWeight(lambda x, w: F.linear(x, w * 2), 6, 6)), noise(2, 6))
    assert probe.run(name_layers) == {"name_layers": 1}
    assert (probe.info.name, probe.info.weight) == ("1", "")


def test_other_products_are_no_layers() -> None:
    probe = GraphProbe(WithWeight(lambda x, w: torch.addmm(x, x @ w, w.t()), 6, 6), noise(6, 6))
    assert probe.run(name_layers) == {"name_layers": 0}
    assert probe.infos == []
