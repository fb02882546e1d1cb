"""What looking for outgrown ranges costs: a call that counts what its layers clip, beside calls that do not.

    python benchmarks/drift_check.py --model sd15 --precision int8 --threshold 20
    python benchmarks/drift_check.py --model sdxl --device cuda --dtype float16

Medians of calls that take turns. "of the time" is what the counting calls add if every 64th is one, the default of
``drift_check_every``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
import onlinequant_backend as oq
from benchmarks.models import build, model_parser, seconds, thresholds
from onlinequant_backend.progress import Progress
from onlinequant_backend.runtime.set_registry import known_sets

EVERY = 64


@torch.no_grad()
def measure(options: argparse.Namespace, cache: str) -> dict[str, list[float]]:
    """Milliseconds of calls of either kind."""
    model, inputs = build(options.model, options.device, getattr(torch, options.dtype), batch=options.batch)
    backend: dict[str, object] = {"precision": options.precision, "calibration_steps": 1, "cache_dir": cache}
    if options.threshold is not None:
        backend.update(thresholds(options.threshold))
    step = torch.compile(model, backend=oq.onlinequant, options={**backend, "drift_check_every": EVERY})
    for _ in range(5):
        step(**inputs)
    (weights,) = known_sets
    times: dict[str, list[float]] = {"plain": [], "counting": []}
    with Progress("timing round", options.rounds) as progress:
        for _ in range(options.rounds):
            progress.advance()
            times["plain"].append(1e3 * seconds(lambda: step(**inputs), options.device))
            weights.schedule.restart()  # the next call counts
            times["counting"].append(1e3 * seconds(lambda: step(**inputs), options.device))
    assert weights.schedule.checks >= options.rounds and not oq.reports()[-1].widened
    return times


def main() -> None:
    parser = model_parser(__doc__, "sd15")
    parser.add_argument("--precision", default="auto", choices=["auto", "int8", "fp8"])
    parser.add_argument("--threshold", type=float, help="of compute density, for both kinds of layers")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        times = measure(options, cache)
    plain, counting = (statistics.median(times[name]) for name in ("plain", "counting"))
    table = Table(title=f"{options.model}, {options.dtype} on {options.device}, {oq.reports()[-1].precision}")
    for heading in ("a call, ms", "one that counts, ms", f"of the time, every {EVERY}th"):
        table.add_column(heading, justify="right")
    table.add_row(f"{plain:.2f}", f"{counting:.2f}", f"{(counting - plain) / (EVERY * plain):.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
