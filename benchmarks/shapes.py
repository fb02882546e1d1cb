"""Several sizes of one model: a compiled graph for each against one with symbolic sizes for all but the first.

    python benchmarks/shapes.py

The UNet is that of `onlinequant demo`: SD1.5's blocks at two levels. Every option runs in a process of its own with
empty caches. "first s" is the time of a size's first call; steps are medians, timed after all sizes have been seen.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.models import relative_error

# Batch, height and width of the latent image, tokens of the prompt.
SIZES = ((1, 64, 64, 77), (2, 64, 64, 77), (1, 96, 64, 77), (1, 64, 96, 154), (2, 48, 48, 77), (1, 40, 72, 231))
OPTIONS = {"precision": "int8", "calibration_steps": 1}


@torch.no_grad()
def run(shapes: str, steps: int, count: int) -> dict[str, Any]:
    """Measure one value of the option ``shapes`` in this process."""
    import onlinequant_backend
    from onlinequant_backend.cli.demo import CHANNELS, TEXT_WIDTH, build_unet

    unet = build_unet(CHANNELS)
    step = torch.compile(unet, backend="onlinequant", options={**OPTIONS, "shapes": shapes})

    def inputs(batch: int, height: int, width: int, tokens: int) -> dict[str, Any]:
        torch.manual_seed(0)
        text = torch.randn(batch, tokens, TEXT_WIDTH)
        sample = torch.randn(batch, 4, height, width)
        return {"sample": sample, "timestep": torch.tensor([500]), "encoder_hidden_states": text, "return_dict": False}

    step(**inputs(*SIZES[0]))  # observed
    rows = []
    sizes = SIZES[:count]
    for size in sizes:
        start = time.perf_counter()
        result = step(**inputs(*size))[0]
        first = time.perf_counter() - start
        with torch.compiler.set_stance("force_eager"):
            expected = unet(**inputs(*size))[0]
        rows.append({"first": first, "error": relative_error(result, expected)})
    for row, size in zip(rows, sizes, strict=True):
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step(**inputs(*size))
            seconds.append(time.perf_counter() - start)
        row["median"] = statistics.median(seconds)
    counters = torch._dynamo.utils.counters
    return {
        "rows": rows,
        "traced": counters["stats"]["unique_graphs"],
        "compiled": counters["inductor"]["fxgraph_cache_miss"],
        "observed": max(report.calls_observed for report in onlinequant_backend.reports()),
    }


def in_process(shapes: str, steps: int, count: int) -> dict[str, Any]:
    """One value of the option in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ONLINEQUANT_CACHE_DIR": folder}
        command = [sys.executable, __file__, "--only", shapes, "--steps", str(steps), "--sizes", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sizes", type=int, default=len(SIZES), metavar="N", help="only the first N")
    parser.add_argument("--only", choices=("auto", "static", "dynamic"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options.only, options.steps, options.sizes)))
        return
    results = {}
    for shapes in ("static", "auto"):
        print(f"measuring shapes={shapes!r}", file=sys.stderr)
        results[shapes] = in_process(shapes, options.steps, options.sizes)
        print(f"  {results[shapes]}", file=sys.stderr)
    table = Table(title=f"SD1.5's blocks at two levels, float32, {torch.get_num_threads()} threads")
    for heading in (
        "batch, latent, tokens",
        "static ms",
        "auto ms",
        "auto / static",
        "static first s",
        "auto first s",
        "error",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, (batch, height, width, tokens) in enumerate(SIZES[: options.sizes]):
        static, auto = (results[shapes]["rows"][i] for shapes in ("static", "auto"))
        table.add_row(
            f"{batch}, {height}x{width}, {tokens}",
            f"{1e3 * static['median']:.0f}",
            f"{1e3 * auto['median']:.0f}",
            f"{auto['median'] / static['median']:.2f}",
            f"{static['first']:.0f}",
            f"{auto['first']:.0f}",
            f"{auto['error']:.4f}",
        )
    console = Console(width=120)
    console.print(table)
    for shapes, result in results.items():
        console.print(
            f"{shapes}: {result['traced']} graphs traced by Dynamo, {result['compiled']} compiled by Inductor"
        )


if __name__ == "__main__":
    main()
