"""What the callable itself costs at every call: finding the weights, and making sure that none has changed.

    python benchmarks/call_overhead.py --weights 700

The compiled graph is replaced by a function that returns at once, so what is left is ours. Times are medians of many
calls; "all values in cache" is a loop that does nothing else, "cold" comes after 80 MB of other memory traffic, as in
a real step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from onlinequant_backend import backend
from onlinequant_backend.torch_internals import inductor_interface

OPTIONS = {"precision": "int8", "calibration_steps": 1, "linear_compute_density_threshold": 0}


class Stack(nn.Module):
    """Many linear layers, one after the other."""

    def __init__(self, weights: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(weights))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def ready_callable(weights: int, width: int) -> tuple[Callable[..., Any], list[Any]]:
    """The backend's callable, past observing, with a compiled graph that does nothing; and a call's arguments."""
    inductor_interface.compile_fx = lambda module, inputs, options, outside_dynamo: lambda *args: None
    captured: list[tuple[Callable[..., Any], list[Any]]] = []

    def capture(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        made = backend.onlinequant(graph_module, inputs, options=OPTIONS)
        captured.append((made, list(inputs)))
        return graph_module

    model = Stack(weights, width).requires_grad_(False)
    torch.compile(model, backend=capture)(torch.randn(4, width))
    ((step, args),) = captured
    for _ in range(2):
        step(*args)
    return step, args


def median_us(call: Callable[[], Any], repeats: int, before: Callable[[], Any] = lambda: None) -> float:
    """Median microseconds of ``call``, each after an untimed ``before``."""
    seconds = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=700)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    step, args = ready_callable(options.weights, options.width)
    parameters = step._traced.inputs.take_parameters(args)
    weights = step._states.of(parameters)
    traffic = torch.zeros(20_000_000)
    rows: dict[str, Callable[[], Any]] = {
        "one whole call": lambda: step(*args),
        "  same parameters": lambda: step._states.of(parameters),
        "  same values": lambda: weights.is_current(parameters),
        "  same shapes": lambda: step._compiler.graphs.key(args, weights),
    }
    table = Table(title=f"Overhead of one call with {options.weights} 8-bit weights, microseconds")
    for heading in ("", "all values in cache", "cold"):
        table.add_column(heading, justify="left" if not heading else "right")
    with torch.no_grad():
        for name, call in rows.items():
            warm = median_us(call, 300)
            cold = median_us(call, 30, before=lambda: traffic.add_(1))
            table.add_row(name, f"{warm:.0f}", f"{cold:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
