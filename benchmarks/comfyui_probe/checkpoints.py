"""Models with random weights that an unpatched ComfyUI detects: full size, or as small as it takes them.

ComfyUI finds out what a checkpoint is from names and shapes alone. Those of the denoisers, ControlNets and autoencoders
are asked of its own classes, built on the meta device; those of the text encoders, which checkpoints store under other
names, are listed here. Weights keep the magnitude of what they are multiplied with, so that no activation overflows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.memory_management
import comfy.model_detection
import comfy.ops
import folder_paths
import torch
from comfy.cldm.cldm import ControlNet
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Shape = tuple[int, ...]

_COMMON: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_checkpoint": False,
    "use_spatial_transformer": True,
    "legacy": False,
    "dtype": torch.float16,
}
# The arguments of the published models.
_FULL: dict[str, dict[str, Any]] = {
    "sd15": {
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "context_dim": 768,
        "use_linear_in_transformer": False,
        "num_heads": 8,
        "num_head_channels": -1,
    },
    "sdxl": {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "num_heads": -1,
        "num_head_channels": 64,
    },
    "svd": {
        "in_channels": 8,
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "context_dim": 1024,
        "use_linear_in_transformer": True,
        "adm_in_channels": 768,
        "num_classes": "sequential",
        "num_heads": -1,
        "num_head_channels": 64,
        "extra_ff_mix_layer": True,
        "use_spatial_context": True,
        "merge_strategy": "learned_with_images",
        "merge_factor": 0.0,
        "video_kernel_size": [3, 1, 1],
        "use_temporal_resblock": True,
        "use_temporal_attention": True,
        "disable_temporal_crossattention": False,
    },
}
# The fewest blocks that are still detected; widths are given.
_TINY: dict[str, dict[str, Any]] = {
    "sd15": {
        "channel_mult": [1, 1],
        "num_res_blocks": [1, 1],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
    },
    "sdxl": {
        "channel_mult": [1, 1, 1],
        "num_res_blocks": [1, 1, 1],
        "transformer_depth": [0, 2, 5],
        "transformer_depth_output": [0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
    },
    "svd": {"channel_mult": [1, 1, 1, 1], "transformer_depth_output": [1] + [0] * 11},
}
_UNET = "model.diffusion_model."
_AUTOENCODER = "first_stage_model."
# What a LoRA of the usual kind changes.
_LORA_LAYERS = (
    *(".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight"),
    *(".ff.net.0.proj.weight", ".ff.net.2.weight", ".in_layers.2.weight"),
)
_LORA_RANK = 16


def write(models: Iterable[Mapping[str, Any]], tiny: bool) -> list[str]:
    """Write the models that are missing, and return a sentence about each.

    Each of ``models`` has a "kind" ("checkpoint", "lora" or "controlnet"), a "model" ("sd15", "sdxl" or "svd"), a
    "file" and a "seed". ``tiny``: few blocks, and text encoders whose layers are zero.
    """
    # With dynamic VRAM on, ComfyUI's layers have no weights before a file is loaded.
    comfy.memory_management.aimdo_enabled = False
    written = []
    for model in models:
        folder = {"checkpoint": "checkpoints", "lora": "loras", "controlnet": "controlnet"}[model["kind"]]
        path = Path(folder_paths.get_folder_paths(folder)[0]) / model["file"]
        if path.exists():
            continue
        start = time.perf_counter()
        maker = _Maker(model["model"], tiny, model["seed"])
        with torch.inference_mode():
            tensors = getattr(maker, model["kind"])()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file(tensors, unfinished)
        unfinished.rename(path)
        gigabytes = path.stat().st_size / 1e9
        written.append(f"{model['file']}: {maker.detected}{gigabytes:.2f} GB, {time.perf_counter() - start:.1f} s")
    return written


class _Maker:
    """The tensors of one file; ``detected`` says what ComfyUI takes a checkpoint for."""

    def __init__(self, model: str, tiny: bool, seed: int) -> None:
        self._model = model
        self._tiny = tiny
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self.detected = ""

    def _arguments(self) -> dict[str, Any]:
        """Of a denoiser, which takes its lists apart."""
        return copy.deepcopy({**_COMMON, **_FULL[self._model], **(_TINY[self._model] if self._tiny else {})})

    def checkpoint(self) -> Tensors:
        """Denoiser, autoencoder and text (or image) encoders."""
        tensors = self._random(_UNET, _shapes(self._unet()))
        config = comfy.model_detection.detect_unet_config(tensors, _UNET)
        found = comfy.model_detection.model_config_from_unet_config(config, tensors, _UNET)
        if found is None:
            raise RuntimeError(f"this ComfyUI does not detect the {self._model} that was written for it")
        self.detected = f"detected as {type(found).__name__}, "
        tensors |= self._autoencoder()
        for prefix, encoder in _ENCODERS[self._model].items():
            tensors |= self._encoder(prefix, encoder())
        return tensors

    def lora(self) -> Tensors:
        """Of the rank that is usual, as strong as to change the picture without destroying it."""
        tensors: Tensors = {}
        for name, shape in _shapes(self._unet()):
            if not name.endswith(_LORA_LAYERS):
                continue
            layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            outside = [1, 1] if len(shape) == 4 else []
            tensors[f"{layer}.lora_down.weight"] = self._normal((_LORA_RANK, *shape[1:]), _preserving(shape))
            tensors[f"{layer}.lora_up.weight"] = self._normal((shape[0], _LORA_RANK, *outside), 0.05)
            tensors[f"{layer}.alpha"] = torch.tensor(float(_LORA_RANK))
        return tensors

    def controlnet(self) -> Tensors:
        """The encoder half of the denoiser; the convolutions to the other one are not zero, as after training."""
        unknown = ("out_channels", "transformer_depth_output")
        arguments = {name: value for name, value in self._arguments().items() if name not in unknown}
        with torch.device("meta"):
            network = ControlNet(hint_channels=3, **arguments, device="meta", operations=comfy.ops.disable_weight_init)
        return self._random("control_model.", _shapes(network))

    def _unet(self) -> torch.nn.Module:
        with torch.device("meta"):
            return UNetModel(**self._arguments(), device="meta", operations=comfy.ops.disable_weight_init)

    def _autoencoder(self) -> Tensors:
        if self._tiny:
            scales = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
            shapes = ((name, shape) for name, shape in _shapes(TAESD()) if name not in scales)
            return self._random(_AUTOENCODER, shapes) | {_AUTOENCODER + name: value for name, value in scales.items()}
        sizes: dict[str, Any] = {
            "double_z": True,
            "z_channels": 4,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
        }
        sizes |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
        return self._random(_AUTOENCODER, _shapes(self._autoencoder_of(sizes)))

    def _autoencoder_of(self, sizes: Mapping[str, Any]) -> torch.nn.Module:
        with torch.device("meta"):
            if self._model != "svd":
                return AutoencoderKL(ddconfig=sizes, embed_dim=4)
            video = {**sizes, "video_kernel_size": [3, 1, 1], "alpha": 0.0}
            parts = {
                "regularizer_config": ("comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer", {}),
                "encoder_config": ("comfy.ldm.modules.diffusionmodules.model.Encoder", sizes),
                "decoder_config": ("comfy.ldm.modules.temporal_ae.VideoDecoder", video),
            }
            return AutoencodingEngine(
                **{part: {"target": target, "params": params} for part, (target, params) in parts.items()}
            )

    def _encoder(self, prefix: str, shapes: Iterator[tuple[str, Shape]]) -> Tensors:
        tensors: Tensors = {}
        for name, shape in shapes:
            inside = "layers." in name or "resblocks." in name
            if self._tiny and inside and "norm" not in name and "ln_" not in name:
                tensors[prefix + name] = torch.zeros(shape, dtype=torch.float16)
            elif name.endswith("token_embedding.weight"):
                tensors[prefix + name] = self._normal(shape, 1.0)
            else:
                tensors[prefix + name] = self._weight(name, shape, 0.5 if inside else 1.0)
        return tensors

    def _random(self, prefix: str, shapes: Iterable[tuple[str, Shape]]) -> Tensors:
        return {prefix + name: self._weight(name, shape) for name, shape in shapes}

    def _weight(self, name: str, shape: Shape, scale: float = 1.0) -> torch.Tensor:
        if name.endswith("mix_factor"):
            return torch.full(shape, 0.5, dtype=torch.float16)
        if len(shape) >= 2:
            return self._normal(shape, scale * _preserving(shape))
        if _is_norm(name):
            return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.float16)
        return self._normal(shape, 0.02)

    def _normal(self, shape: Shape, deviation: float) -> torch.Tensor:
        values = torch.empty(shape, device=self._device).normal_(0, deviation, generator=self._generator)
        return values.half().cpu()


def _shapes(network: torch.nn.Module) -> Iterator[tuple[str, Shape]]:
    return ((name, tuple(parameter.shape)) for name, parameter in network.named_parameters())


def _preserving(shape: Shape) -> float:
    """The standard deviation of weights whose outputs are as large as their inputs."""
    return float(torch.Size(shape[1:]).numel()) ** -0.5


def _is_norm(name: str) -> bool:
    """ComfyUI's UNets have their GroupNorms at places in a Sequential."""
    return "norm" in name or "ln_" in name or "layers.0." in name or name.endswith((".0.weight", ".0.bias"))


def _linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _clip_l() -> Iterator[tuple[str, Shape]]:
    """CLIP's text encoder as Hugging Face names it."""
    width, layers = 768, 12
    yield "embeddings.token_embedding.weight", (49408, width)
    yield "embeddings.position_embedding.weight", (77, width)
    for number in range(layers):
        layer = f"encoder.layers.{number}"
        yield from _norm(f"{layer}.layer_norm1", width)
        yield from _norm(f"{layer}.layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", width, width)
        yield from _linear(f"{layer}.mlp.fc1", 4 * width, width)
        yield from _linear(f"{layer}.mlp.fc2", width, 4 * width)
    yield from _norm("final_layer_norm", width)


def _open_clip() -> Iterator[tuple[str, Shape]]:
    """The transformer of OpenCLIP's larger encoders, as OpenCLIP names it."""
    width, layers = 1280, 32
    for number in range(layers):
        block = f"transformer.resblocks.{number}"
        yield from _norm(f"{block}.ln_1", width)
        yield from _norm(f"{block}.ln_2", width)
        yield f"{block}.attn.in_proj_weight", (3 * width, width)
        yield f"{block}.attn.in_proj_bias", (3 * width,)
        yield from _linear(f"{block}.attn.out_proj", width, width)
        yield from _linear(f"{block}.mlp.c_fc", 4 * width, width)
        yield from _linear(f"{block}.mlp.c_proj", width, 4 * width)


def _clip_g() -> Iterator[tuple[str, Shape]]:
    yield from _open_clip()
    yield "token_embedding.weight", (49408, 1280)
    yield "positional_embedding", (77, 1280)
    yield from _norm("ln_final", 1280)
    yield "text_projection", (1280, 1280)


def _vision() -> Iterator[tuple[str, Shape]]:
    """ViT-H/14."""
    yield from _open_clip()
    yield "class_embedding", (1280,)
    yield "positional_embedding", (257, 1280)
    yield "conv1.weight", (1280, 3, 14, 14)
    yield from _norm("ln_pre", 1280)
    yield from _norm("ln_post", 1280)
    yield "proj", (1280, 1024)


_ENCODERS: dict[str, dict[str, Any]] = {
    "sd15": {"cond_stage_model.transformer.text_model.": _clip_l},
    "sdxl": {
        "conditioner.embedders.0.transformer.text_model.": _clip_l,
        "conditioner.embedders.1.model.": _clip_g,
    },
    "svd": {"conditioner.embedders.0.open_clip.model.visual.": _vision},
}
