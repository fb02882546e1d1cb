"""Trains what `onlinequant_backend/scenes` ships: the denoiser and the classifier of features.

    python benchmarks/train_scenes.py --device cuda --minutes 8

Scenes are drawn on the device as they are needed, so no picture is seen twice. The weights are those of an average over
the last tenth of training or so; a checkpoint is written every few minutes, and Ctrl-C goes on with the last one.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import train_scene_features
from benchmarks.muon import Muon
from benchmarks.scene_batches import Clock, Scenes
from benchmarks.train_scene_text import train_text
from onlinequant_backend.progress import Progress
from onlinequant_backend.scenes import judge
from onlinequant_backend.scenes.model import LATENT_CHANNELS, LATENT_SIZE, WEIGHTS, ScenesModel, load
from onlinequant_backend.scenes.sampling import sample
from onlinequant_backend.scenes.scene import captions
from onlinequant_backend.scenes.sheet import save_sheet

# Wide, even areas show through much noise, so the last step must be noise alone: with Stable Diffusion's own betas a
# model learns to read the background's brightness from it, and then draws every background grey.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    # A narrow model can draw a simple picture; to hand on the noise of 48 channels, as for a velocity, takes width.
    # Li and He, "Back to Basics: Let Denoising Generative Models Denoise", 2025.
    "prediction_type": "sample",
}
MAX_WEIGHT = 4  # where there is hardly any noise left, there is little to learn
STEPS_EXPONENT = 3  # half of all steps are among the noisiest eighth: a caption tells nothing where things can be seen
CAPTION_DROPOUT = 0.1
EMA_EXPONENT = 16  # the average reaches back over a twentieth of training
SAVE_EVERY = 180  # seconds
HISTORY = "history.json"

History = list[list[float]]  # rows of seconds, pictures seen and loss


def model_config(widths: Sequence[int], attention: Sequence[int], text_width: int) -> dict[str, Any]:
    """A UNet as wide as ``widths`` on its levels, with cross-attention where ``attention`` says."""
    return {
        "unet": {
            "sample_size": LATENT_SIZE,
            "in_channels": LATENT_CHANNELS + 2,  # see ScenesModel.placed
            "out_channels": LATENT_CHANNELS,
            "block_out_channels": widths,
            "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
            "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
            "layers_per_block": 1,
            "cross_attention_dim": text_width,
            "addition_embed_type": "text",  # adds the pooled text to the time's embedding, much as SDXL does
            "addition_embed_type_num_heads": 4,
            "attention_head_dim": 4,  # the number of heads, under a name that diffusers keeps for old checkpoints
        },
        "text_width": text_width,
        "scheduler": SCHEDULER,
    }


def train_denoiser(options: argparse.Namespace, device: torch.device) -> None:
    """Train for ``options.minutes``, and write the averaged weights and the losses into ``options.output``."""
    torch.manual_seed(options.seed)
    model = ScenesModel(model_config(options.widths, options.attention, options.text_width))
    model = model.to(device, memory_format=torch.channels_last)
    scenes = Scenes(device, options.seed)
    if options.start_from:
        model.load_state_dict(load(device, path=options.start_from).state_dict())
    else:
        print(f"text encoder: {100 * train_text(model.text, scenes):.2f}% of the answers are right")
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model, options.lr)
    clock = Clock(options.minutes)
    alphas = DDPMScheduler(**SCHEDULER).alphas_cumprod.to(device)
    history: History = []
    losses: list[torch.Tensor] = []
    saved = 0.0
    with Progress("training: per cent", 100) as progress:
        for step in itertools.count(1):
            model.zero_grad(set_to_none=True)
            loss = denoising_loss(model, alphas, scenes, options.batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = learning_rate(options.lr, step, clock.share)
                optimizer.step()
            update_average(average, model, step)
            losses.append(loss.detach())
            if len(losses) == 50:  # asked for seldom: each answer waits for the device
                history.append([clock.elapsed, step * options.batch, torch.stack(losses).mean().item()])
                losses = []
                progress.advance(f"loss {history[-1][2]:.4f}", to=int(100 * clock.share))
            if clock.elapsed - saved > SAVE_EVERY or clock.share == 1:
                saved = clock.elapsed
                save(average, history, options.output)
            if clock.share == 1:
                return


def make_optimizers(model: ScenesModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden layers' weights, AdamW for the rest: what comes first and last, embeddings, biases, norms."""
    outer = ("words", "positions", "conv_in", "conv_out")
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim >= 2 and not any(part in name for part in outer)
        (hidden if is_hidden else rest).append(parameter)
    return [Muon(hidden, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0.01)]


def learning_rate(peak: float, step: int, share: float) -> float:
    """A warm-up of 100 steps, then half a cosine over the time there is."""
    return peak * min(step / 100, 1) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-6


def denoising_loss(model: ScenesModel, alphas: torch.Tensor, scenes: Scenes, batch: int) -> torch.Tensor:
    """Mean squared error of the predicted pictures, weighted as if velocities were predicted.

    Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, appendix D.
    """
    pictures, tokens, _ = scenes.batch(batch)
    dropped = torch.rand(batch, 1, device=tokens.device) < CAPTION_DROPOUT
    latents = model.to_latents(pictures)
    # One of each stretch, so that batches differ less in how much noise they have.
    places = (torch.arange(batch, device=tokens.device) + torch.rand((), device=tokens.device)) / batch
    steps = (1000 * (1 - places**STEPS_EXPONENT)).long().clamp(0, 999)
    signal = alphas[steps, None, None, None]  # share of the variance
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * torch.randn_like(latents)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
        states = model.text(tokens.masked_fill(dropped, 0))
        predicted = model.unet(model.placed(noisy), steps, states, return_dict=False)[0]
    weights = (1 / (1 - signal)).clamp(max=MAX_WEIGHT)
    return (weights * (predicted.float() - latents).square()).mean()


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, equation 3."""
    weight = 1 - (1 - 1 / step) ** (EMA_EXPONENT + 1)
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)


def save(model: ScenesModel, history: History, output: Path) -> None:
    """Write the weights in float16, with what makes the model, and the losses so far."""
    weights = {name: tensor.half().contiguous().cpu() for name, tensor in model.state_dict().items()}
    part = (output / WEIGHTS.name).with_suffix(".part")
    save_file(weights, part, {"config": json.dumps(model.config)})
    part.chmod(0o644)  # safetensors makes files that only their owner can read
    part.replace(part.with_suffix(WEIGHTS.suffix))
    (output / HISTORY).write_text(json.dumps(history))


def plot_losses(history: History, path: Path) -> None:
    figure = Figure(figsize=(7, 3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([seen / 1000 for _, seen, _ in history], [loss for _, _, loss in history], linewidth=1)
    axes.set(xlabel="pictures seen, in thousands", ylabel="loss", yscale="log")
    axes.grid(which="both", alpha=0.3)
    figure.savefig(path, format="png")


def evaluate(device: torch.device, output: Path, count: int) -> None:
    """Print how many of ``count`` pictures show what their captions say, for captions trained on and held out."""
    model = load(device, path=output / WEIGHTS.name)
    for name, held_out in (("trained on", False), ("held out", True)):
        texts = captions(count, seed=1, held_out=held_out)
        with Progress(f"drawing captions that were {name}"):
            pictures = sample(model.unet, model, texts, seed=0, batch=min(count, 64))
        print(f"captions {name}: {100 * judge.score(pictures, texts):.1f}% of {count} pictures are right")
    save_sheet(output / "samples.png", {"held out": pictures[:16]}, texts[:16])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8, help="for the denoiser")
    parser.add_argument("--features-minutes", type=float, default=1, help="for the classifier; 0 leaves it as it is")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96], help="channels of each level")
    parser.add_argument(
        "--attention", type=int, nargs="+", default=[0, 1], help="1 for each level that attends to text"
    )
    parser.add_argument("--text-width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=256, help="drawn and judged at the end, twice")
    parser.add_argument("--start-from", type=Path, help="weights of this shape, instead of random ones")
    parser.add_argument("--output", type=Path, default=Path("build/scenes"))
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    try:
        train_denoiser(options, device)
    except KeyboardInterrupt:
        print("Stopped: going on with the last checkpoint.")
    if options.features_minutes:
        path = options.output / train_scene_features.WEIGHTS.name
        right = train_scene_features.train(device, options.features_minutes, options.seed, path)
        print(f"classifier: {100 * right:.2f}% of its answers are right")
    history: History = json.loads((options.output / HISTORY).read_text())
    seconds, seen, loss = history[-1]
    print(f"{seen} pictures in {seconds / 60:.1f} minutes, last loss {loss:.4f}")
    plot_losses(history, options.output / "loss.png")
    evaluate(device, options.output, options.pictures)
    print(f"Copy {options.output / '*.safetensors'} into {WEIGHTS.parent} to ship them.")


if __name__ == "__main__":
    main()
