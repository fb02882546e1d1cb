"""What observing adds to a float step: statistics of the input of every candidate, and its sensitivity at the end.

    python benchmarks/observing.py --model sd15
    python benchmarks/observing.py --model sdxl --device cuda --dtype float16

Eager steps and observed ones take turns in one process, so that both see the same machine. The first observed call with
Dynamo's tracing and the last one, which measures sensitivities, have rows of their own. Nothing is compiled. "GiB" is
the most memory in use in such a call: a GPU's that tensors are in, on a CPU the whole process's.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
import onlinequant_backend
from benchmarks import peak_memory
from benchmarks.models import build, model_parser, seconds, thresholds


def timed(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds and the peak of memory, in GiB, of a call."""
    peak_memory.start(device, give_back=False)
    took = seconds(call, device)
    return took, next(iter(peak_memory.peaks(device).values()))


def medians(calls: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the seconds, and of the peaks."""
    times, peaks = zip(*calls, strict=True)
    return statistics.median(times), statistics.median(peaks)


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
            eager.append(timed(lambda: model(**inputs), options.device))
            observed.append(timed(lambda: step(**inputs), options.device))
    report = onlinequant_backend.reports()[-1]
    assert report.calls_observed == options.calls, report.summary()
    first, *between, last = observed
    plain, plain_peak = medians(eager)
    table = Table(title=f"{options.model}, batch {options.batch}, {options.dtype} on {options.device}")
    for heading in ("a call", "median ms", "least", "most", "of eager", "GiB", "of eager"):
        table.add_column(heading, justify="right" if heading != "a call" else "left")
    rows = {"eager": eager, "observed": between, "the first, traced by Dynamo": [first], "the last": [last]}
    for name, calls in rows.items():
        median, peak = medians(calls)
        times = [time for time, _ in calls]
        cells = [f"{1e3 * time:.4g}" for time in (median, min(times), max(times))]
        table.add_row(name, *cells, f"{median / plain:.2f}", f"{peak:.2f}", f"{peak / plain_peak:.2f}")
    Console().print(table)
    print(f"{len(report.decisions)} layers are observed")


if __name__ == "__main__":
    main()
