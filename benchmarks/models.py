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
# FLUX.1 [dev]: 19 double and 38 single blocks, 12 billion parameters.
FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
# Wan 2.1 for text to video: 40 blocks, 14 billion parameters.
WAN = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "text_dim": 4096}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": SD15,
    "sdxl": SDXL,
    "sdxl-small": SDXL_SMALL,
    "svd": SVD,
    "flux": FLUX,
    "wan": WAN,
}
MODELS = tuple(CONFIGS)
_TRANSFORMERS = ("flux", "wan")
UNETS = tuple(name for name in MODELS if name not in _TRANSFORMERS)
# Height and width of the latent image at which each was trained.
NATIVE = {
    "sd15": (64, 64),
    "sdxl": (128, 128),
    "sdxl-small": (32, 32),
    "svd": (72, 128),
    "flux": (128, 128),
    "wan": (60, 104),
}


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
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    torch.manual_seed(seed)
    model = _denoiser(name, device, dtype, {**CONFIGS[name], **(config or {})})
    return model, step_inputs(name, device, dtype, batch, size)


def _denoiser(name: str, device: str, dtype: torch.dtype, config: Mapping[str, Any]) -> torch.nn.Module:
    import diffusers

    kinds = {
        "svd": diffusers.UNetSpatioTemporalConditionModel,
        "flux": diffusers.FluxTransformer2DModel,
        "wan": diffusers.WanTransformer3DModel,
    }
    with torch.device(device), _default_dtype(dtype):
        model: Any = kinds.get(name, diffusers.UNet2DConditionModel)(**config)  # diffusers' types say nothing of Module
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return model if name in ("svd", *_TRANSFORMERS) else model.to(memory_format=torch.channels_last)


def step_inputs(
    name: str, device: str, dtype: torch.dtype, batch: int, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The keyword arguments of one step at a size, with random values."""
    height, width = size or NATIVE[name]

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def filled(count: int, value: float) -> torch.Tensor:
        return torch.full((count,), value, device=device)

    if name == "flux":  # two by two values of a latent image of 16 channels are a token
        image_ids = torch.cartesian_prod(*(torch.arange(length // 2, device=device) for length in (height, width)))
        return {
            "hidden_states": noise(batch, len(image_ids), 64),
            "encoder_hidden_states": noise(batch, 512, 4096),
            "pooled_projections": noise(batch, 768),
            "timestep": filled(batch, 0.5),
            "guidance": filled(batch, 3.5),
            "img_ids": torch.nn.functional.pad(image_ids, (1, 0)).to(dtype),
            "txt_ids": torch.zeros(512, 3, device=device, dtype=dtype),
            "return_dict": False,
        }
    if name == "wan":  # 21 latent images are 81 frames
        video = {"hidden_states": noise(batch, 16, 21, height, width), "timestep": filled(batch, 500)}
        return {**video, "encoder_hidden_states": noise(batch, 512, 4096), "return_dict": False}
    image = (25, 8) if name == "svd" else (4,)
    text = {"sd15": (77, 768), "sdxl": (77, 2048), "sdxl-small": (77, 512), "svd": (1, 1024)}[name]
    inputs: dict[str, Any] = {"sample": noise(batch, *image, height, width), "timestep": filled(1, 500.0)}
    inputs["encoder_hidden_states"] = noise(batch, *text)
    if name == "svd":
        inputs["added_time_ids"] = noise(batch, 3)
    elif name != "sd15":
        # SDXL is told the size of the original, the corner of the crop and the size of the picture, in pixels.
        pixels = [8.0 * height, 8.0 * width]
        time_ids = torch.tensor([[*pixels, 0.0, 0.0, *pixels]] * batch, device=device, dtype=dtype)
        inputs["added_cond_kwargs"] = {"text_embeds": noise(batch, 1280), "time_ids": time_ids}
    return {**inputs, "return_dict": False}


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
