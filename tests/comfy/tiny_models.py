"""Small models beside those of ``make_tiny.py``, made of random numbers and of parts of these."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
Tensors = dict[str, torch.Tensor]


def write_small_unet(checkpoint: Path, to: Path) -> None:
    """A denoiser of SD1.5's kind with the fewest blocks, for UNETLoader: what is compiled in a third of the time."""
    unet = {name.removeprefix(UNET): tensor for name, tensor in _part(checkpoint, UNET).items()}
    save_file(_without_downsampling(unet), to)


def write_small_control_net(file: Path, to: Path) -> None:
    """A ControlNet for it."""
    save_file(_without_downsampling(_part(file, "control_model.")), to)


def _without_downsampling(network: Tensors) -> Tensors:
    """The blocks of a tiny SD1.5's larger size, all of which are equally wide; only the first has attention."""
    unwanted = re.compile(r"(input_blocks|zero_convs)\.[23]\.|output_blocks\.([01]\.|[23]\.1\.)")
    kept = {name: tensor for name, tensor in network.items() if not unwanted.search(name)}
    return {re.sub(r"(?<=output_blocks\.)[23]", lambda n: str(int(n[0]) - 2), name): kept[name] for name in kept}


def write_dit(checkpoint: Path, to: Path, seed: int = 0) -> None:
    """A checkpoint of Stable Diffusion 3's kind, as small as ComfyUI takes one.

    ``checkpoint``: of SD1.5, whose text encoder it is meant for. Its autoencoder is taken over, with more channels.
    """
    generator = torch.Generator().manual_seed(seed)
    autoencoder = _part(checkpoint, AUTOENCODER)
    shapes = {f"{AUTOENCODER}taesd_{name}": shape for name, shape in _MORE_CHANNELS.items()}
    shapes |= {UNET + name: shape for name, shape in _dit_shapes().items()}
    save_file(autoencoder | {name: _random(shape, generator) for name, shape in shapes.items()}, to)


def _part(checkpoint: Path, prefix: str) -> Tensors:
    with safe_open(checkpoint, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A weight that keeps the magnitude of what it is multiplied with, or a small bias."""
    scale = 0.02 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
    return torch.randn(shape, generator=generator).mul(scale).half()


_MORE_CHANNELS = {"decoder.1.weight": (64, 16, 3, 3), "encoder.14.weight": (16, 64, 3, 3), "encoder.14.bias": (16,)}


def _dit_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the weights and biases of an MMDiT of two blocks; ComfyUI takes all sizes from them."""
    width, blocks, text, frequencies, patch, channels = 128, 2, 768, 256, 2, 16
    linears = {
        "t_embedder.mlp.0": (width, frequencies),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, text),
        "y_embedder.mlp.2": (width, width),
        "context_embedder": (width, text),
        "final_layer.linear": (patch * patch * channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    whole = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
        "adaLN_modulation.1": (6 * width, width),
    }
    # What the text becomes in the last block is not needed any more.
    last = {"attn.qkv": (3 * width, width), "adaLN_modulation.1": (2 * width, width)}
    for block in range(blocks):
        context = last if block == blocks - 1 else whole
        for stream, layers in (("context_block", context), ("x_block", whole)):
            linears |= {f"joint_blocks.{block}.{stream}.{name}": shape for name, shape in layers.items()}
    weights: dict[str, tuple[int, ...]] = dict(linears) | {"x_embedder.proj": (width, channels, patch, patch)}
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    return shapes | {"pos_embed": (1, 1024, width)}
