"""How long it takes to quantize a whole UNet's weights, and to follow when they change.

    python benchmarks/requantize.py --dtype float32
    python benchmarks/requantize.py --model sdxl --dtype bfloat16

No graph is compiled and no step is run: what is timed is the backend's own ``Layer`` for each conv and linear weight,
brought up to date as it is before a step (``Layer.refresh``). "Values and scales" is the part of it that is the same
on every device, without packing for the CPU's kernels or laying out for the GPU's. The LoRA goes through diffusers
and PEFT. Times are medians with their spread, GB/s count float weights, and extra memory is the peak above what was in
use before: the first time, that is the 8-bit copies too.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import peak_memory
from benchmarks.models import build, model_parser
from onlinequant_backend import errors
from onlinequant_backend.graph import ConvGeometry
from onlinequant_backend.kernels import formats, precision
from onlinequant_backend.kernels.formats import Format
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.quantization.weight_quantization import quantize_weight

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


@dataclasses.dataclass
class Measurement:
    """One row: what changed, and what following it took."""

    what: str
    weights: list[torch.Tensor]
    seconds: list[float]
    extra: float  # GiB

    def cells(self) -> tuple[str, ...]:
        """The row as the table shows it."""
        median = statistics.median(self.seconds)
        seconds = f"{median:.2f} ({min(self.seconds):.2f}-{max(self.seconds):.2f})"
        memory = f"{1024 * self.extra:.0f}"
        if not self.weights:
            return self.what, "", "", seconds, "", "", memory
        millions = sum(weight.numel() for weight in self.weights) / 1e6
        gigabytes = sum(weight.nbytes for weight in self.weights) / 1e9
        speeds = (f"{millions / median:.0f} M/s", f"{gigabytes / median:.2f}")
        return self.what, str(len(self.weights)), f"{millions:.0f} M", seconds, *speeds, memory


def quantizable(model: nn.Module) -> list[tuple[torch.Tensor, ConvGeometry | None]]:
    """Every weight that could run in 8 bit."""
    found: list[tuple[torch.Tensor, ConvGeometry | None]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found.append((module.weight, None))
        elif isinstance(module, nn.Conv2d) and module.groups == 1 and not isinstance(module.padding, str):
            found.append((module.weight, ConvGeometry(module.stride, module.padding, module.dilation)))
    return found


def refresh(layers: list[tuple[Layer, torch.Tensor]], expected: int) -> None:
    """Quantize what has changed, which must be as many weights as ``expected``."""
    changed = sum(layer.refresh(weight) for layer, weight in layers)
    assert changed == expected, f"{changed} weights were quantized instead of {expected}"


def quantize_values(weights: list[torch.Tensor], format: Format) -> None:
    """Quantize one weight after the other, and keep none."""
    for weight in weights:
        quantize_weight(weight, format)


def measure(
    what: str,
    weights: list[torch.Tensor],
    device: str,
    run: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    repeats: int = 3,
) -> Measurement:
    """Time ``run``, each after an untimed ``before``."""
    seconds, extra = [], 0.0
    for _ in range(repeats):
        before()
        peak_memory.start(device)
        in_use = peak_memory.peak(device)
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        extra = max(extra, peak_memory.peak(device) - in_use)
    return Measurement(what, weights, seconds, extra)


def attention_lora(model: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """A LoRA for all attention projections, with random weights."""
    state_dict = {}
    for name, module in model.named_modules():
        if name.endswith(ATTENTION) and isinstance(module, nn.Linear):
            weight = module.weight
            state_dict[f"{name}.lora_A.weight"] = torch.randn_like(weight[:rank]) / weight.shape[1] ** 0.5
            state_dict[f"{name}.lora_B.weight"] = torch.randn_like(weight[:, :rank]) / 100
    return state_dict


def measure_layers(model: nn.Module, format: Format, device: str) -> list[Measurement]:
    """All weights for the first time, after a change of all, after none, and after a LoRA."""
    pairs = quantizable(model)
    weights = [weight for weight, _ in pairs]
    layers: list[tuple[Layer, torch.Tensor]] = []

    def forget() -> None:
        layers.clear()
        layers.extend((Layer(geometry, format, "mse", weight.device), weight) for weight, geometry in pairs)

    def change() -> None:
        for weight in weights:
            weight.mul_(-1)

    count = len(weights)
    rows = [
        measure("all, for the first time", weights, device, lambda: refresh(layers, count), before=forget),
        measure("all, changed in place", weights, device, lambda: refresh(layers, count), before=change),
        measure("none, only looking for changes", [], device, lambda: refresh(layers, 0)),
    ]
    lora = attention_lora(model, rank=16)
    adapted = [module.weight for name, module in model.named_modules() if f"{name}.lora_A.weight" in lora]
    model.load_lora_adapter(lora, prefix=None)
    switch = itertools.cycle((model.fuse_lora, model.unfuse_lora))
    fused = measure(
        "those of a LoRA, fused or unfused",
        adapted,
        device,
        lambda: refresh(layers, len(adapted)),
        before=lambda: next(switch)(),
    )
    return [*rows, fused]


@torch.no_grad()
def main() -> None:
    options = model_parser(__doc__, "sd15").parse_args()
    console = Console(width=140)
    model, _ = build(options.model, options.device, getattr(torch, options.dtype), batch=1)
    weights = [weight for weight, _ in quantizable(model)]
    try:
        format = precision.resolve("int8", torch.device(options.device)).format
    except errors.PrecisionUnavailableError as error:
        console.print(f"There is nothing to requantize on {options.device}, where models stay in float: {error}")
        format = None
    values = "all, values and scales alone"
    rows = [measure(values, weights, options.device, lambda: quantize_values(weights, format or formats.INT8))]
    if format is not None:
        rows += measure_layers(model, format, options.device)
    where = f"{torch.get_num_threads()} threads" if options.device == "cpu" else torch.cuda.get_device_name()
    table = Table(title=f"Quantizing the weights of {options.model}, {options.dtype}, {where}")
    for heading in ("which", "weights", "parameters", "seconds (min-max)", "parameters/s", "GB/s", "extra MiB"):
        table.add_column(heading, justify="left" if heading == "which" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)


if __name__ == "__main__":
    main()
