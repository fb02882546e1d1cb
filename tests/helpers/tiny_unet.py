"""The smallest UNet of diffusers whose layers all matter."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

# How the names of those layers end that tests change.
ADAPTED = (".to_q", ".to_k", ".to_v", ".to_out.0", ".conv1")


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """A UNet with one transformer block, which counts for about as much as in a trained model."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    for name, parameter in unet.requires_grad_(False).named_parameters():
        if name.endswith("to_out.0.weight"):
            parameter.mul_(4)
    return unet.eval()
