"""Real denoisers with random weights: the published configurations and one step's real arguments. Nothing is
downloaded."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

SDXL = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
# SDXL's blocks and depth at a fifth of its width, for machines on which the real one takes too long.
SDXL_SMALL = {
    **SDXL,
    "block_out_channels": [64, 128, 256],
    "attention_head_dim": [2, 4, 8],
    "cross_attention_dim": 512,
    "sample_size": 32,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SVD = {
    "sample_size": 96,
    "in_channels": 8,
    "out_channels": 4,
    "num_frames": 25,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "transformer_layers_per_block": 1,
    "num_attention_heads": [5, 10, 20, 20],
}
MODELS = ("sd15", "sdxl", "sdxl-small", "svd")
# Height and width of the latent image at which each was trained.
NATIVE = {"sd15": (64, 64), "sdxl": (128, 128), "sdxl-small": (32, 32), "svd": (72, 128)}


def build(
    name: str,
    device: str,
    dtype: torch.dtype,
    batch: int,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A denoiser of ``MODELS`` and the keyword arguments of one step.

    ``size``: height and width of the latent image, an eighth of the picture's; None for the native size. ``config``:
    entries that replace those of the published configuration. "meta" is an allowed device: shapes without values.
    """
    from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel

    torch.manual_seed(seed)
    height, width = size or NATIVE.get(name, (0, 0))
    changes = dict(config or {})

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    timestep = torch.full((1,), 500.0, device=device)
    with torch.device(device), _default_dtype(dtype):
        model: Any  # diffusers' types say nothing of Module
        # SDXL is told the size of the original, the corner of the crop and the size of the picture, in pixels.
        pixels = [8.0 * height, 8.0 * width]
        time_ids = torch.tensor([[*pixels, 0.0, 0.0, *pixels]] * batch)
        if name == "sd15":
            model = UNet2DConditionModel(**{**SD15, **changes})
            inputs: dict[str, Any] = {"sample": noise(batch, 4, height, width), "timestep": timestep}
            inputs["encoder_hidden_states"] = noise(batch, 77, 768)
        elif name == "sdxl":
            model = UNet2DConditionModel(**{**SDXL, **changes})
            inputs = {"sample": noise(batch, 4, height, width), "timestep": timestep}
            inputs["encoder_hidden_states"] = noise(batch, 77, 2048)
            inputs["added_cond_kwargs"] = {"text_embeds": noise(batch, 1280), "time_ids": time_ids}
        elif name == "sdxl-small":
            model = UNet2DConditionModel(**{**SDXL_SMALL, **changes})
            inputs = {"sample": noise(batch, 4, height, width), "timestep": timestep}
            inputs["encoder_hidden_states"] = noise(batch, 77, 512)
            inputs["added_cond_kwargs"] = {"text_embeds": noise(batch, 1280), "time_ids": time_ids}
        elif name == "svd":
            model = UNetSpatioTemporalConditionModel(**{**SVD, **changes})
            inputs = {"sample": noise(batch, 25, 8, height, width), "timestep": timestep}
            inputs["encoder_hidden_states"] = noise(batch, 1, 1024)
            inputs["added_time_ids"] = noise(batch, 3)
        else:
            raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    if name != "svd":
        model = model.to(memory_format=torch.channels_last)
    return model, {**inputs, "return_dict": False}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # Weights made in their final dtype leave no float32 twin in the peak memory.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def thresholds(density: float) -> dict[str, float]:
    """The backend's options that set both thresholds of compute density."""
    return {f"{kind}_compute_density_threshold": density for kind in ("conv", "linear")}


# What layers of GPUs go by that are not timed.
GPU_THRESHOLDS = {"conv_compute_density_threshold": 100, "linear_compute_density_threshold": 300}


def model_parser(description: str | None, model: str) -> argparse.ArgumentParser:
    """What ``build`` needs, as arguments: ``--model``, ``--device`` and ``--dtype``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model, choices=MODELS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return parser


def seconds(call: Callable[[], object], device: str) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """``||result - expected|| / ||expected||``."""
    result, expected = result.double(), expected.double()
    return float((result - expected).norm() / expected.norm())
