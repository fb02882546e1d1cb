"""``onlinequant demo``: one set of pictures, drawn eagerly, by torch.compile and by onlinequant on this CPU."""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..cache.calibration_file import STATS_FILE
from ..console import SIMPLE_HEAD
from ..kernels import precision
from ..progress import Progress
from ..report import report
from ..report.image_quality import psnr, ssim
from ..scenes import judge
from ..scenes.model import LATENT_CHANNELS, LATENT_SIZE, ScenesModel, load
from ..scenes.sampling import sample
from ..scenes.scene import captions
from ..scenes.sheet import save_sheet

# Others than those that are observed.
_DRAWN_SEED, _OBSERVED_SEED = 0, 1
_AMPLIFIED = 8  # differences of a good 8-bit picture are too faint to see


@dataclasses.dataclass
class Contestant:
    """One way of running the model.

    Attributes:
        name: how it is called in the table.
        denoise: the UNet, called as diffusers calls it.
        first_seconds: time until it runs like this: compiling, and before that what has to be observed.
        pictures: what it drew, [N, 3, 64, 64] in [-1, 1].
        seconds: time of each step in the race.
    """

    name: str
    denoise: Callable[..., Any]
    first_seconds: float
    pictures: torch.Tensor
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.seconds)


def run(
    output: Path, *, pictures: int = 16, steps: int = 20, rounds: int = 10, console: Console | None = None
) -> report.Report:
    """Draw, compare, print a table to ``console`` (standard output), and write a sheet of the pictures, statistics and
    a plot into ``output``.

    ``pictures``: how many, all in one batch; ``steps``: of the sampler; ``rounds``: in which single steps are timed.
    Raises ModuleNotFoundError without diffusers, PrecisionUnavailableError where the CPU has no 8-bit kernels, and
    OSError where ``output`` cannot be written.
    """
    console = console or Console(highlight=False)
    precision.resolve("int8", torch.device("cpu"))
    model = load()
    output.mkdir(parents=True, exist_ok=True)
    texts = captions(pictures, seed=_DRAWN_SEED, held_out=True)
    millions = sum(parameter.numel() for parameter in model.unet.parameters()) / 1e6
    console.print(f"A trained UNet of {millions:.1f} million weights in float32, {torch.get_num_threads()} CPU threads")
    console.print(
        f"{pictures} captions that it was not trained on, {steps} steps, guidance in batches of {2 * pictures}"
    )
    # A cache of its own: every time the demo is the first time. Windows cannot delete the libraries that are loaded.
    with tempfile.TemporaryDirectory(prefix="onlinequant-demo-", ignore_cleanup_errors=True) as cache:
        contestants = _drawn(model, texts, steps, cache)
        _race(contestants, model, pictures, rounds)
    made = report.reports()[-1]
    console.print(_table(contestants, texts, made))
    _print_notes(console, contestants, made)
    _write(output, contestants, texts, made)
    console.print(f"The pictures: {output / 'sheet.png'}", soft_wrap=True)
    console.print(f"Every layer's decision and its reason: {output / STATS_FILE}", soft_wrap=True)
    console.print(f"The same as a picture: {output / 'layers.png'}", soft_wrap=True)
    return made


def _drawn(model: ScenesModel, texts: Sequence[str], steps: int, cache: str) -> list[Contestant]:
    """Everyone's pictures of ``texts``, from the same noise."""
    options: dict[str, Any] = {"precision": "int8", "cache_dir": cache}
    onlinequant = torch.compile(model.unet, backend="onlinequant", options=options)
    return [
        _draw("eager", model.unet, model, texts, steps),
        _draw("torch.compile", torch.compile(model.unet), model, texts, steps),
        _draw("onlinequant", onlinequant, model, texts, steps, observe=True),
    ]


def _draw(
    name: str,
    denoise: Callable[..., Any],
    model: ScenesModel,
    texts: Sequence[str],
    steps: int,
    observe: bool = False,
) -> Contestant:
    def drawn(texts: Sequence[str], seed: int, steps: int = steps, observe: bool = False) -> torch.Tensor:
        return sample(denoise, model, texts, seed, steps=steps, batch=len(texts), observe=observe)

    start = time.perf_counter()
    if observe:  # shows its progress itself
        drawn(captions(len(texts), seed=_OBSERVED_SEED), _OBSERVED_SEED, observe=True)
    with Progress(f"{name}: first step"):
        drawn(texts, _DRAWN_SEED, steps=1)
    first_seconds = time.perf_counter() - start
    with Progress(f"{name}: drawing"):
        return Contestant(name, denoise, first_seconds, drawn(texts, _DRAWN_SEED))


def _race(contestants: Sequence[Contestant], model: ScenesModel, pictures: int, rounds: int) -> None:
    """Time everyone's step once a round, so that whatever else the machine does slows all of them alike."""
    texts = model.encode([""] * 2 * pictures)
    latents = model.placed(
        torch.randn(len(texts), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, dtype=torch.float32, device="cpu")
    )
    time_step = torch.full((len(texts),), 500.0, dtype=torch.float32, device="cpu")
    with torch.no_grad(), Progress("timing round", rounds) as progress:
        for _ in range(rounds):
            progress.advance()
            for contestant in contestants:
                start = time.perf_counter()
                contestant.denoise(latents, time_step, texts, return_dict=False)
                contestant.seconds.append(time.perf_counter() - start)


def _table(contestants: Sequence[Contestant], texts: Sequence[str], made: report.Report) -> Table:
    """A column each; pictures are compared with those of the first, and speed with the second."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", no_wrap=True)
    for contestant in contestants:
        table.add_column(contestant.name, justify="right", no_wrap=True)
    reference, baseline = contestants[0].pictures, contestants[1].median
    decibels = [[psnr(*pair, peak=2) for pair in zip(c.pictures, reference, strict=True)] for c in contestants]
    rows = {
        "milliseconds a step": [f"{1e3 * c.median:.0f}" for c in contestants],
        "speed-up over torch.compile": [f"{baseline / c.median:.2f}x" for c in contestants],
        "seconds until it runs like this": [f"{c.first_seconds:.0f}" for c in contestants],
        "PSNR to eager, mean of the pictures": [_decibels(statistics.fmean(values)) for values in decibels],
        "PSNR to eager, worst picture": [_decibels(min(values)) for values in decibels],
        "SSIM to eager": [f"{ssim(c.pictures, reference, peak=2):.4f}" for c in contestants],
        "captions drawn right": [f"{judge.correct(c.pictures, texts).sum()} of {len(texts)}" for c in contestants],
    }
    counts = made.counts()
    for kind, name in (("conv", "convolutions"), ("linear", "linear layers")):
        in_8_bit = f"{counts[f'quantized_{kind}']} of {counts[f'candidates_{kind}']}"
        rows[f"{name} in 8 bit"] = ["", "", in_8_bit]
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _decibels(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f} dB"


def _print_notes(console: Console, contestants: Sequence[Contestant], made: report.Report) -> None:
    if made.phase != "quantized":
        console.print(f"Nothing ran in 8 bit: {made.phase_reason}", style="bold red", soft_wrap=True)
    elif contestants[2].median >= contestants[1].median:
        console.print("8 bit is not faster here, for this model.", soft_wrap=True)
    automatic = precision.resolve("auto", torch.device("cpu"))
    if automatic.name == "float":
        console.print(f'precision="auto" would stay in float here: {automatic.reason}.', soft_wrap=True)
        console.print('The demo ran with precision="int8".', soft_wrap=True)


def _write(output: Path, contestants: Sequence[Contestant], texts: Sequence[str], made: report.Report) -> None:
    reference, quantized = contestants[0].pictures, contestants[2].pictures
    rows = {
        "float": reference,
        "8 bit": quantized,
        f"difference x {_AMPLIFIED}": (_AMPLIFIED * (quantized - reference)).clamp(-1, 1),  # grey is none
    }
    save_sheet(output / "sheet.png", rows, texts)
    made.save(output / STATS_FILE)
    made.plot(output / "layers.png")
