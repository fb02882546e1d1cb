"""Outliers make activations uneven, and leave what the model computes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.outliers import enlarge_channels, enlarge_start_token
from tests.helpers.tiny import noise, relative_error

TEXT = noise(2, 7, 64, seed=2)


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT.shape[-1],
        attention_head_dim=2,
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def step(model: nn.Module, text: torch.Tensor = TEXT) -> torch.Tensor:
    return model(noise(2, 4, 8, 8), 500, text, return_dict=False)[0]


@torch.no_grad()
def inputs_of(model: nn.Module, name: str) -> torch.Tensor:
    """The largest magnitude in each channel of a layer's input; channels are its second dimension in convolutions."""
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].abs()))
    step(model)
    handle.remove()
    return (
        seen[0].transpose(1, -1).flatten(0, -2).amax(0) if layer.weight.dim() == 4 else seen[0].flatten(0, -2).amax(0)
    )


@pytest.mark.parametrize(
    ("norm", "reader"),
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.norm1", "attn1.to_k"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.norm3", "ff.net.0.proj"),
        ("down_blocks.0.resnets.0.norm2", "conv2"),
        ("conv_norm_out", "conv_out"),
    ],
)
def test_chosen_channels_are_large(norm: str, reader: str) -> None:
    model = unet()
    reader = ".".join([*norm.split(".")[:-1], reader])
    before = inputs_of(model, reader)
    chosen = [outlier.channel for outlier in enlarge_channels(model, count=3) if outlier.norm == norm]
    after = inputs_of(model, reader)
    others = [channel for channel in range(len(after)) if channel not in chosen]
    assert len(chosen) == 3
    assert after[chosen].min() > 4 * after[others].max()
    assert after[chosen].min() > 10 * before[chosen].min()


def test_every_norm_has_outliers() -> None:
    model = unet()
    norms = {name for name, module in model.named_modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))}
    assert {outlier.norm for outlier in enlarge_channels(model)} == norms


def test_what_layer_norms_feed_stays_exact() -> None:
    model = unet()
    expected = step(model)
    assert enlarge_channels(model, kinds=(nn.LayerNorm,))
    assert relative_error(step(model), expected) < 1e-5


def test_with_group_norms_it_stays_about_the_same() -> None:
    model = unet()
    expected = step(model)
    enlarge_channels(model, count=1)
    result = step(model)
    assert result.isfinite().all()
    assert relative_error(result, expected) < 0.3


def test_choices_follow_the_seed() -> None:
    assert enlarge_channels(unet(), seed=1) == enlarge_channels(unet(), seed=1) != enlarge_channels(unet(), seed=2)


def test_start_token_is_long_and_changes_little() -> None:
    model = unet()
    text = TEXT.clone()
    text[:, 0] = text[0, 0]
    expected = step(model, text)
    enlarged = enlarge_start_token(model, text, factor=30)
    lengths = enlarged.norm(dim=-1)
    assert torch.equal(enlarged[:, 1:], text[:, 1:])
    assert lengths[0, 0] == lengths[1, 0] == pytest.approx(30 * lengths[:, 1:].mean().item(), rel=1e-3)
    assert relative_error(step(model, enlarged), expected) < 0.1
