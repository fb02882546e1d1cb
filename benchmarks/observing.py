"""What observing adds to a float step: statistics of the input of every candidate, and its sensitivity at the end.

    python benchmarks/observing.py --model sd15
    python benchmarks/observing.py --model sdxl --device cuda --dtype float16

Eager steps and observed ones take turns in one process, so that both see the same machine. The first observed call with
Dynamo's tracing and the last one, which measures sensitivities, have rows of their own. Nothing is compiled.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
import onlinequant_backend
from benchmarks.models import build, model_parser, seconds, thresholds


@torch.no_grad()
def main() -> None:
    parser = model_parser(__doc__, "sd15")
    parser.add_argument("--precision", default="int8", choices=["int8", "fp8"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=7, help="that are observed")
    options = parser.parse_args()
    model, inputs = build(options.model, options.device, getattr(torch, options.dtype), options.batch)
    cache = tempfile.TemporaryDirectory()  # else nothing is observed the second time
    given = {"precision": options.precision, "calibration_steps": options.calls, "cache_dir": cache.name}
    given |= thresholds(0)
    step = torch.compile(model, backend="onlinequant", options=given)
    model(**inputs)
    eager, observed = [], []
    with Console(stderr=True).status("observing"):
        for _ in range(options.calls):
            eager.append(seconds(lambda: model(**inputs), options.device))
            observed.append(seconds(lambda: step(**inputs), options.device))
    report = onlinequant_backend.reports()[-1]
    assert report.calls_observed == options.calls, report.summary()
    first, *between, last = observed
    plain = statistics.median(eager)
    table = Table(title=f"{options.model}, batch {options.batch}, {options.dtype} on {options.device}, in ms")
    for heading in ("a call", "median", "least", "most", "of eager"):
        table.add_column(heading, justify="right" if heading != "a call" else "left")
    rows = {"eager": eager, "observed": between, "the first, traced by Dynamo": [first], "the last": [last]}
    for name, times in rows.items():
        cells = [statistics.median(times), min(times), max(times)]
        table.add_row(name, *(f"{1e3 * cell:.4g}" for cell in cells), f"{cells[0] / plain:.2f}")
    Console().print(table)
    print(f"{len(report.decisions)} layers are observed")


if __name__ == "__main__":
    main()
