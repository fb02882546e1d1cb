"""How long a cold compile takes, and a step after it: torch.compile, and onlinequant with and without regions.

    python benchmarks/compile_time.py --model sdxl-small
    python benchmarks/compile_time.py --model sdxl --device cuda --dtype float16

Each row is a process of its own with empty caches, one after the other. "compile" is the time of the calls up to the
first compiled one, Dynamo's tracing included, less what these calls take anyway: observed ones in float, the last one
compiled. "ratio" is to torch.compile. The step is the median of some, with their least and most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.models import build, model_parser, relative_error, seconds

ROWS: dict[str, dict[str, Any] | None] = {
    "torch.compile": None,
    "onlinequant, as a whole": {"regional_compilation": False},
    "onlinequant, in regions": {"regional_compilation": True},
}


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    model, inputs = build(options.model, options.device, getattr(torch, options.dtype), options.batch)
    expected = model(**inputs)[0]
    in_float = min(seconds(lambda: model(**inputs), options.device) for _ in range(2))
    backend = ROWS[options.row]
    if backend is None:
        step, observed = torch.compile(model), 0
    else:
        given = {"precision": options.precision, "calibration_steps": 1, **backend}
        step, observed = torch.compile(model, backend="onlinequant", options=given), 1
    first = sum(seconds(lambda: step(**inputs), options.device) for _ in range(observed + 1))
    times = [seconds(lambda: step(**inputs), options.device) for _ in range(options.rounds)]
    return {
        "compile": first - observed * in_float - statistics.median(times),
        "step": [1e3 * value for value in (statistics.median(times), min(times), max(times))],
        "error": relative_error(step(**inputs)[0], expected),
    }


def in_a_process(row: str) -> dict[str, Any]:
    """The same in a process of its own, with empty caches."""
    with tempfile.TemporaryDirectory() as caches:
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/torch", "TRITON_CACHE_DIR": f"{caches}/triton"}
        if ROWS[row] is not None:
            environment = {"ONLINEQUANT_CACHE_DIR": f"{caches}/oq", "TRITON_CACHE_DIR": f"{caches}/triton"}
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = model_parser(__doc__, "sdxl-small")
    parser.add_argument("--precision", default="int8", choices=["int8", "fp8"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(measure(options)))
        return
    console = Console()
    table = Table(title=f"{options.model}, {options.dtype} on {options.device}, {options.precision}, cold")
    for heading in ("", "compile, s", "ratio", "a step, ms", "relative error"):
        table.add_column(heading, justify="left" if not heading else "right")
    compiled: float | None = None
    for number, row in enumerate(options.rows, start=1):
        with console.status(f"{row}, {number} of {len(options.rows)}"):
            result = in_a_process(row)
        print(row, result, file=sys.stderr, flush=True)
        median, least, most = result["step"]
        compiled = result["compile"] if ROWS[row] is None else compiled
        ratio = f"{result['compile'] / compiled:.2f}" if compiled else ""
        times = f"{median:.4g} ({least:.4g}-{most:.4g})"
        table.add_row(row, f"{result['compile']:.1f}", ratio, times, f"{result['error']:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
