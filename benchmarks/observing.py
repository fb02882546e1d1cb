"""What observing adds to a float step: statistics of the input of every candidate, and its sensitivity at the end.

    python benchmarks/observing.py --model sd15
    python benchmarks/observing.py --model sdxl --device cuda --dtype float16

Eager steps and observed ones take turns in one process, so that both see the same machine. The first observed call with
Dynamo's tracing and the last one, which measures sensitivities, have rows of their own. Nothing is compiled. "GiB" is
the most memory in use in such a call: a GPU's that tensors are in, on a CPU the whole process's. To find that takes
time, so of the calls in between one in two is timed, and the others' memory is looked at.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
import onlinequant_backend
from benchmarks import peak_memory
from benchmarks.models import build, model_parser, seconds, thresholds


class Calls:
    """What calls of one kind took, each with its peak of memory or without."""

    def __init__(self, call: Callable[[], object], device: str) -> None:
        self._call, self._device = call, device
        self._taken: list[tuple[float, float | None]] = []

    def add(self, watches_memory: bool) -> None:
        if watches_memory:
            peak_memory.start(self._device)
        took = seconds(self._call, self._device)
        peak = peak_memory.peak(self._device) if watches_memory else None
        self._taken.append((took, peak))

    def seconds(self) -> list[float]:
        """Of the calls that were only timed, if there are some."""
        return [took for took, peak in self._taken if peak is None] or [took for took, _ in self._taken]

    def peak(self) -> float:
        """In GiB."""
        return statistics.median(peak for _, peak in self._taken if peak is not None)


@torch.no_grad()
def main() -> None:
    parser = model_parser(__doc__, "sd15")
    parser.add_argument("--precision", default="int8", choices=["int8", "fp8"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=7, help="that are observed; 4 at least")
    options = parser.parse_args()
    model, inputs = build(options.model, options.device, getattr(torch, options.dtype), options.batch)
    cache = tempfile.TemporaryDirectory()  # else nothing is observed the second time
    given = {"precision": options.precision, "calibration_steps": options.calls, "cache_dir": cache.name}
    given |= thresholds(0)
    step = torch.compile(model, backend="onlinequant", options=given)
    model(**inputs)
    eager = Calls(lambda: model(**inputs), options.device)
    first, observed, last = (Calls(lambda: step(**inputs), options.device) for _ in range(3))
    with Console(stderr=True).status("observing"):
        for number in range(options.calls):
            eager.add(number % 2 == 1)
            if number in (0, options.calls - 1):
                (last if number else first).add(True)
            else:
                observed.add(number % 2 == 1)
    report = onlinequant_backend.reports()[-1]
    assert report.calls_observed == options.calls, report.summary()
    table = Table(title=f"{options.model}, batch {options.batch}, {options.dtype} on {options.device}")
    for heading in ("a call", "median ms", "least", "most", "of eager", "GiB", "of eager"):
        table.add_column(heading, justify="right" if heading != "a call" else "left")
    plain = statistics.median(eager.seconds())
    rows = {"eager": eager, "observed": observed, "the first, traced by Dynamo": first, "the last": last}
    for name, calls in rows.items():
        times, peak = calls.seconds(), calls.peak()
        cells = [f"{1e3 * time:.4g}" for time in (statistics.median(times), min(times), max(times))]
        table.add_row(
            name, *cells, f"{statistics.median(times) / plain:.2f}", f"{peak:.2f}", f"{peak / eager.peak():.2f}"
        )
    Console().print(table)
    print(f"{len(report.decisions)} layers are observed")


if __name__ == "__main__":
    main()
