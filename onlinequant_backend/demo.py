"""``onlinequant demo``: one UNet, run eagerly, by torch.compile and by onlinequant, side by side on this CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import precision, report
from .progress import Progress

# SD1.5's kinds of blocks, text width and heads. All four of its levels would keep Inductor busy for more than two
# minutes, twice, on two cores; these two take less than one each, and are wide enough for 8 bit to pay.
CHANNELS = (160, 320)
LATENT_SIZE = 64
TEXT_TOKENS, TEXT_WIDTH = 77, 768

# A CPU's memory keeps up with far fewer FLOPs per byte than a GPU's: the defaults, 100 and 300, are where a GPU stops
# waiting for memory, and would leave layers in float here that gain from 8 bit.
CPU_DENSITY_THRESHOLD = 20


@dataclasses.dataclass
class Contestant:
    """One way of running the model.

    Attributes:
        name: how it is called in the table.
        step: the model, called as diffusers calls it.
        first_seconds: time of its first calls: compiling, and what has to be observed.
        seconds: time of each step since.
        output: the predicted noise, [1, 4, size, size].
    """

    name: str
    step: Callable[..., Any]
    first_seconds: float
    output: torch.Tensor
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.seconds)


def run(
    output: Path,
    *,
    channels: Sequence[int] = CHANNELS,
    size: int = LATENT_SIZE,
    steps: int = 5,
    calibration_steps: int = 4,
    console: Console | None = None,
) -> report.Report:
    """Measure, print a table to ``console`` (standard output), and write statistics and a plot into ``output``.

    ``channels``: width of each level of the UNet, multiples of 32. ``size``: height and width of the latent image.
    Raises ModuleNotFoundError without diffusers, PrecisionUnavailableError where the CPU has no 8-bit kernels, and
    OSError where ``output`` cannot be written.
    """
    console = console or Console(highlight=False)
    precision.resolve("int8", torch.device("cpu"))
    output.mkdir(parents=True, exist_ok=True)
    unet = build_unet(channels)
    options: dict[str, Any] = {
        "precision": "int8",
        "calibration_steps": calibration_steps,
        "conv_compute_density_threshold": CPU_DENSITY_THRESHOLD,
        "linear_compute_density_threshold": CPU_DENSITY_THRESHOLD,
    }
    millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    console.print(f"A UNet with Stable Diffusion 1.5's blocks: {millions:.0f} million random weights in float32")
    console.print(f"One step: latent image {size}x{size}, batch 1, {torch.get_num_threads()} CPU threads")
    seen = _inputs(size, seed=0)
    # Calibrated on other inputs than the error is measured on.
    observed = [_inputs(size, seed=1 + call) for call in range(calibration_steps)]
    with torch.no_grad():
        eager = _warmed_up("eager", unet, [seen])
        with Progress("torch.compile: compiling"):
            compiled = _warmed_up("torch.compile", torch.compile(unet), [seen])
        # This shows its progress itself.
        onlinequant = torch.compile(unet, backend="onlinequant", options=options)
        quantized = _warmed_up("onlinequant", onlinequant, [*observed, seen])
        contestants = [eager, compiled, quantized]
        _race(contestants, seen, steps)
    made = report.reports()[-1]
    console.print(_table(contestants, made))
    _print_notes(console, made)
    made.save(output / report.STATS_FILE)
    made.plot(output / "layers.png")
    console.print(f"Every decision and its reason: {output / report.STATS_FILE}", soft_wrap=True)
    console.print(f"The same as a picture: {output / 'layers.png'}", soft_wrap=True)
    return made


def build_unet(channels: Sequence[int]) -> torch.nn.Module:
    """A ``UNet2DConditionModel`` with random weights: attention on every level but the last, as in SD1.5."""
    if importlib.util.find_spec("diffusers") is None:
        raise ModuleNotFoundError("The demo's model comes from diffusers: pip install 'onlinequant[demo]'")
    from diffusers import UNet2DConditionModel

    attention = len(channels) - 1
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=tuple(channels),
        down_block_types=("CrossAttnDownBlock2D",) * attention + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attention,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
    )
    return unet.eval().requires_grad_(False)


def _inputs(size: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(1, 4, size, size, generator=generator),
        "timestep": torch.randint(0, 1000, (1,), generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator),
        "return_dict": False,
    }


def _warmed_up(name: str, step: Callable[..., Any], calls: Sequence[dict[str, Any]]) -> Contestant:
    """Call ``step`` once with each of ``calls``; the output is that of the last."""
    start = time.perf_counter()
    for inputs in calls:
        output = step(**inputs)[0]
    return Contestant(name, step, time.perf_counter() - start, output)


def _race(contestants: Sequence[Contestant], inputs: dict[str, Any], rounds: int) -> None:
    """Time everyone's step once a round, so that whatever else the machine does slows all of them alike."""
    with Progress("timing round", rounds) as progress:
        for _ in range(rounds):
            progress.advance()
            for contestant in contestants:
                start = time.perf_counter()
                contestant.step(**inputs)
                contestant.seconds.append(time.perf_counter() - start)


def _table(contestants: Sequence[Contestant], made: report.Report) -> Table:
    """One row each; errors are against the first, and speed is compared with the second."""
    counts = made.counts()
    expected, baseline = contestants[0].output, contestants[1].median
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("ms/step", "speed-up", "error", "8-bit conv", "8-bit linear", "first calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in contestants:
        is_quantized = row is contestants[-1]
        table.add_row(
            row.name,
            f"{1e3 * row.median:.0f}",
            f"{baseline / row.median:.2f}x",
            f"{(row.output - expected).norm() / expected.norm():.4f}",
            *(
                f"{counts[f'quantized_{kind}']} of {counts[f'candidates_{kind}']}" if is_quantized else ""
                for kind in report.KINDS
            ),
            f"{row.first_seconds:.0f} s",
        )
    return table


def _print_notes(console: Console, made: report.Report) -> None:
    console.print("Speed-up is over torch.compile; error is |output - eager| / |eager|, in 2-norms.", soft_wrap=True)
    automatic = precision.resolve("auto", torch.device("cpu"))
    if automatic.name == "float":
        console.print(f'precision="auto" would stay in float here: {automatic.reason}.', soft_wrap=True)
        console.print('The demo ran with precision="int8".', soft_wrap=True)
    if made.phase != "quantized":
        console.print(f"Nothing ran in 8 bit: {made.phase_reason}", style="bold red", soft_wrap=True)
