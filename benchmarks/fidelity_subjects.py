"""What ``fidelity.py`` draws with: a trained model and its judge, or a random one and a projection of its latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.models import build
from benchmarks.outliers import enlarge_channels, enlarge_start_token
from onlinequant_backend.scenes import features, judge, sampling, scene
from onlinequant_backend.scenes.model import load

SAMPLERS = ("euler", "dpm++2m", "ddim")
# Of the captions and noises that are drawn, and of those that are observed.
DRAWN, OBSERVED = 0, 1000
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}

Denoiser = Callable[..., Any]


class Subject(Protocol):
    """A model, and how pictures are drawn with it.

    Attributes:
        model: the denoiser.
        batch: pictures that are drawn at a time.
    """

    model: nn.Module
    batch: int

    def sample(self, denoise: Denoiser, seed: int, count: int, sampler: str, steps: int) -> Iterable[torch.Tensor]:
        """Draw ``count`` results, a batch at a time. ``seed``: of captions and noise."""

    def pictures(self, results: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, H, W] in [0, 1]; ``reference``: the float model's results, for values without a range."""

    def captions(self, count: int) -> list[str]:
        """What was to be drawn from seed ``DRAWN``."""

    def judge(self, results: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        """More about what was drawn from seed ``DRAWN``, by column."""


class Scenes:
    """The trained model that ships with the package, judged by what it was asked to draw."""

    def __init__(self, device: str, dtype: torch.dtype, batch: int, outliers: bool) -> None:
        self.batch = batch
        self._whole = load(device, dtype)
        self.model: nn.Module = self._whole.unet
        if outliers:
            enlarge_channels(self.model)

    def sample(self, denoise: Denoiser, seed: int, count: int, sampler: str, steps: int) -> Iterable[torch.Tensor]:
        captions = scene.captions(count, seed)
        for start in range(0, count, self.batch):
            chosen = captions[start : start + self.batch]
            settings: dict[str, Any] = {"sampler": sampler, "steps": steps, "batch": self.batch}
            yield sampling.sample(denoise, self._whole, chosen, seed + start, **settings)

    def pictures(self, results: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return (results + 1) / 2

    def captions(self, count: int) -> list[str]:
        return scene.captions(count, DRAWN)

    def judge(self, results: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        return {
            "accuracy": judge.score(results, self.captions(len(results))),
            "Frechet": features.frechet_distance(features.features(results), features.features(reference)),
        }


class RandomWeights:
    """A published configuration with random weights. Its outputs are scaled as if they were predicted noise."""

    def __init__(
        self,
        name: str,
        device: str,
        dtype: torch.dtype,
        batch: int,
        size: tuple[int, int] | None,
        outliers: bool,
    ) -> None:
        self.batch = batch
        self.model, self._inputs = build(name, device, dtype, batch, size=size)
        self._start: torch.Tensor | None = None
        if outliers:
            enlarge_channels(self.model)
            text = self._inputs["encoder_hidden_states"]
            if text.shape[1] > 1:  # SVD's only token is a picture's
                self._start = enlarge_start_token(self.model, text)[:, :1]
        # SVD is shown a picture beside the noise.
        sample = self._inputs["sample"]
        self._shown = sample[:, :, 4:] if name == "svd" else sample[:, :0]
        self._channels = 2 if name == "svd" else 1
        with torch.no_grad():
            self._gain = 1 / float(self.model(**self._inputs)[0].float().std())

    def sample(self, denoise: Denoiser, seed: int, count: int, sampler: str, steps: int) -> Iterable[torch.Tensor]:
        for start in range(0, count, self.batch):
            yield self._sample_batch(denoise, seed + start, sampler, steps)

    @torch.no_grad()
    def _sample_batch(self, denoise: Denoiser, seed: int, sampler: str, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        inputs = dict(self._inputs)
        sample, text = inputs["sample"], inputs["encoder_hidden_states"]
        inputs["encoder_hidden_states"] = torch.randn(text.shape, generator=generator).to(text)
        if self._start is not None:
            inputs["encoder_hidden_states"][:, :1] = self._start
        plan = scheduler(sampler, _SCHEDULE)
        plan.set_timesteps(steps)
        shape = (*sample.shape[: self._channels], 4, *sample.shape[-2:])
        latents = torch.randn(shape, generator=generator).to(sample.device) * plan.init_noise_sigma
        for timestep in plan.timesteps:
            scaled = plan.scale_model_input(latents, timestep).to(sample.dtype)
            inputs["sample"] = torch.cat([scaled, self._shown], dim=self._channels)
            inputs["timestep"] = timestep.reshape(1).to(sample.device, torch.float32)
            noise = self._gain * denoise(**inputs)[0].float()
            latents = plan.step(noise, timestep, latents, return_dict=False)[0]
        return latents

    def pictures(self, results: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Three fixed mixtures of the latents' four channels, of which three deviations around the mean are shown."""
        mixture = torch.linalg.qr(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))[0]

        def mixed(values: torch.Tensor) -> torch.Tensor:
            return torch.einsum("nchw,cd->ndhw", values.float().cpu().reshape(-1, *values.shape[-3:]), mixture)

        expected = mixed(reference)
        return ((mixed(results) - expected.mean()) / (6 * expected.std()) + 0.5).clamp(0, 1)

    def captions(self, count: int) -> list[str]:
        return [f"noise {number}" for number in range(count)]

    def judge(self, results: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        return {}


def scheduler(name: str, config: dict[str, Any]) -> Any:
    """A scheduler of diffusers by its short name."""
    import diffusers

    kinds = {
        "euler": diffusers.EulerDiscreteScheduler,
        "dpm++2m": diffusers.DPMSolverMultistepScheduler,
        "ddim": diffusers.DDIMScheduler,
    }
    extra = {"clip_sample": False} if name == "ddim" else {}
    return kinds[name](**config, **extra)
