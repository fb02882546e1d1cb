"""The denoiser with its text encoder and, instead of a VAE, a rearrangement of pixels."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from .scene import BACKGROUNDS, COLOURS, SHAPES, SIZES

WEIGHTS = Path(__file__).parent / "denoiser.safetensors"
TOKENS = 24  # three more than the longest caption has words
LATENT_CHANNELS, LATENT_SIZE, _BLOCK = 48, 16, 4

# Their order is part of what was trained.
_GRAMMAR = ("a", "background", "with", "at", "the", "and", "top", "bottom", "left", "right")
_WORDS = (*_GRAMMAR, *BACKGROUNDS, *COLOURS, *SIZES, *SHAPES)
_IDS = {word: index + 1 for index, word in enumerate(_WORDS)}  # 0 fills up what is shorter


class TextEncoder(nn.Module):
    """Words and their positions, each with its neighbours': a convolution as wide as a thing's phrase binds the shape
    to its colour and place, so the denoiser's first cross-attention can already ask for what is at a place.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(_WORDS) + 1, width)
        nn.init.normal_(self.words.weight, std=0.1)  # so that the phrase is soon heard among its words
        self.positions = nn.Parameter(self.words.weight.new_empty(TOKENS, width).normal_(std=0.02))
        self.phrase = nn.Conv1d(width, 4 * width, kernel_size=9, padding=4)
        self.out = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Text states [N, TOKENS, width] of ``tokens``, int64 [N, TOKENS]."""
        words = self.words(tokens) + self.positions
        return self.norm(words + self.out(F.gelu(self.phrase(words.mT).mT)))


class ScenesModel(nn.Module):
    """A text-conditioned denoiser of scenes.

    Attributes:
        unet: a ``UNet2DConditionModel`` of diffusers, from what ``placed`` returns to latents [N, 48, 16, 16].
        text: the text encoder.
        config: what made both, as JSON has it: ``unet``, ``text_width`` and ``scheduler``.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if importlib.util.find_spec("diffusers") is None:
            raise ModuleNotFoundError("The model of scenes comes from diffusers: pip install 'onlinequant[demo]'")
        from diffusers import UNet2DConditionModel

        self.config = config
        self.unet: Any = UNet2DConditionModel(**config["unet"])
        self.text = TextEncoder(config["text_width"])

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Arguments for the schedulers of diffusers."""
        return dict(self.config["scheduler"])

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """Text states [N, T, W], on the model's device and of its dtype; an empty caption is for guidance.

        Raises ValueError for a word that no caption of a scene has.
        """
        return self.text(tokenize(captions).to(self.text.positions.device))

    @staticmethod
    def placed(latents: torch.Tensor) -> torch.Tensor:
        """Latents [N, 48, 16, 16] with two more channels that say how far to the right and down each is, in [-1, 1].

        Liu et al., "An Intriguing Failing of Convolutional Neural Networks and the CoordConv Solution", 2018: captions
        speak of places, and without these it takes long to learn where the frame is.
        """
        line = torch.linspace(-1, 1, LATENT_SIZE, device=latents.device, dtype=latents.dtype)
        down, right = torch.meshgrid(line, line, indexing="ij")
        return torch.cat([latents, torch.stack([right, down]).expand(len(latents), -1, -1, -1)], 1)

    @staticmethod
    def decode(latents: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, 64, 64] in [-1, 1] of latents [N, 48, 16, 16]."""
        return F.pixel_shuffle(latents, _BLOCK).clamp(-1, 1)

    @staticmethod
    def to_latents(pictures: torch.Tensor) -> torch.Tensor:
        """The inverse of ``decode``."""
        return F.pixel_unshuffle(pictures, _BLOCK)


def tokenize(captions: Sequence[str]) -> torch.Tensor:
    """Numbers of the words of each caption, int64 [N, TOKENS], filled up with zeros."""
    rows = []
    for text in captions:
        words = text.split()
        unknown = [word for word in words if word not in _IDS]
        if unknown or len(words) > TOKENS:
            raise ValueError(f"{text!r}: no word {unknown[0]!r}" if unknown else f"{text!r}: over {TOKENS} words")
        rows.append([_IDS[word] for word in words] + [0] * (TOKENS - len(words)))
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def load(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, path: Path = WEIGHTS) -> ScenesModel:
    """The trained model, for inference.

    Raises ModuleNotFoundError without diffusers, and FileNotFoundError where no model was trained.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path.name} in {str(path.parent)!r}: `python benchmarks/train_scenes.py` makes one."
        )
    with safe_open(path, framework="pt") as file:
        model = ScenesModel(json.loads(file.metadata()["config"]))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        model.load_state_dict(weights, assign=True)
    return model.to(device, dtype).eval().requires_grad_(False)
