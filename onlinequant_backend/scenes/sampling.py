"""Pictures from captions, with the samplers of diffusers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..runtime import sampling_run
from .model import LATENT_CHANNELS, LATENT_SIZE, ScenesModel

Denoiser = Callable[..., Any]
SAMPLERS = ("euler", "dpm++2m", "ddim")


def sample(
    denoise: Denoiser,
    model: ScenesModel,
    captions: Sequence[str],
    seed: int,
    *,
    sampler: str = "euler",
    steps: int = 25,
    guidance: float = 3.0,
    batch: int = 16,
    observe: bool = False,
) -> torch.Tensor:
    """A picture for each caption, float32 [N, 3, 64, 64] in [-1, 1], on the CPU.

    ``denoise``: ``model.unet``, or that compiled. Always called with ``2 * batch`` latents, with captions and without
    them for classifier-free guidance; the last call's are filled up. Each picture starts from noise of its own, which
    depends on ``seed`` and its place among ``captions`` alone. ``observe``: have onlinequant observe all these calls.
    Raises ValueError for an unknown ``sampler`` and for a word that no caption of a scene has.
    """
    scheduler = make_scheduler(sampler, model)
    filled = [*captions, *[""] * (-len(captions) % batch)]
    pictures = []
    calls = steps * len(filled) // batch
    with torch.no_grad(), sampling_run(calls) if observe else contextlib.nullcontext():
        for first in range(0, len(filled), batch):
            noise = torch.stack([_noise(seed, index) for index in range(first, first + batch)])
            texts = model.encode([*filled[first : first + batch], *[""] * batch])
            scheduler.set_timesteps(steps)
            pictures.append(model.decode(_denoised(denoise, scheduler, noise, texts, guidance)).cpu())
    return torch.cat(pictures)[: len(captions)]


def make_scheduler(sampler: str, model: ScenesModel) -> Any:
    """One of the schedulers of diffusers, set up as ``model`` was trained."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    if sampler == "euler":
        return EulerDiscreteScheduler(**model.scheduler_config)
    if sampler == "dpm++2m":
        # Guidance makes the model correct more than a solver of second order is stable for: predictions swing far out
        # of [-1, 1], in float as well. So they are brought back, as for all pixels (Lu et al., "DPM-Solver++", 2022).
        return DPMSolverMultistepScheduler(**model.scheduler_config, thresholding=True)
    if sampler == "ddim":
        return DDIMScheduler(**model.scheduler_config, clip_sample=False)
    raise ValueError(f"no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")


def _noise(seed: int, index: int) -> torch.Tensor:
    """Made on the CPU, so that it is the same for every device."""
    generator = torch.Generator().manual_seed((seed << 24) + index)
    return torch.randn(
        LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator, dtype=torch.float32, device="cpu"
    )


def _denoised(
    denoise: Denoiser, scheduler: Any, noise: torch.Tensor, texts: torch.Tensor, guidance: float
) -> torch.Tensor:
    """Latents; they stay in float32, whatever the dtype of ``texts`` and of the model."""
    latents = noise.to(texts.device) * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, step)
        inputs = ScenesModel.placed(torch.cat([scaled, scaled])).to(texts.dtype)
        # A float for each latent, whatever a scheduler counts in: one graph serves all of them.
        time = torch.full((len(inputs),), float(step), dtype=torch.float32, device=texts.device)
        told, untold = denoise(inputs, time, texts, return_dict=False)[0].float().chunk(2)
        latents = scheduler.step(untold + guidance * (told - untold), step, latents, return_dict=False)[0]
    return latents
