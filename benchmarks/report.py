"""What the Report node adds to a prompt, without the sending of its picture to the browser.

    python benchmarks/report.py --layers 794

"First" is in a process that has only waited for matplotlib; "same layers" is every later prompt, in which the times of
the steps are new; "other layers" one in which a decision is. Medians of many prompts, in milliseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from onlinequant_backend import Report
from onlinequant_backend.comfy_integration.record import FLOAT, QUANTIZED, Pace, Snapshot
from onlinequant_backend.report import NodeDecision

PARTS = ("first", "same layers", "other layers")


def decisions(layers: int, first_quantized: bool) -> list[NodeDecision]:
    """As many as SDXL has, with all that a row and a mark take."""
    names = [f"input_blocks.{i // 80}.1.transformer_blocks.{i % 80 // 8}.attn{i % 2}.to_{i % 8}" for i in range(layers)]
    return [
        NodeDecision(
            name,
            "linear" if i % 15 else "conv",
            (2, 4096, 640),
            (640, 640),
            6_710_886_400,
            11_304_960,
            20 + 7.3 * (i % 97),
            0.001 * (1 + i % 61),
            0.001,
            1e-6,
            quantized=bool(i % 5) or (first_quantized and i == 0),
            reason="selected" if i % 5 else f"gains too little: {i}.1 us in 8 bit, {i}.0 us in float",
            float_us=12.0,
            quantized_us=7.0,
        )
        for i, name in enumerate(names)
    ]


def prompt(summary: Any, snapshot: Snapshot, folder: Path, times: Callable[[str, float], None]) -> None:
    """What the node does."""
    pictures: list[Any] = []
    marks = [time.perf_counter()]
    for part, work in (
        ("line", lambda: summary.headline(snapshot)),
        ("table", lambda: summary.table(snapshot, None)),
        ("chart", lambda: pictures.append(summary.chart(snapshot))),
        ("image", lambda: summary.as_image(pictures[0])),
        ("file", lambda: summary.save(pictures[0], folder)),
    ):
        work()
        marks.append(time.perf_counter())
        times(part, 1e3 * (marks[-1] - marks[-2]))
    times("all", 1e3 * (marks[-1] - marks[0]))


def measured(layers: int, prompts: int, folder: Path) -> Mapping[str, Mapping[str, list[float]]]:
    """By kind of prompt, and by part of it."""
    found: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in PARTS}
    start = time.perf_counter()
    from onlinequant_backend.comfy_integration import summary

    summary.warm_up()
    found["first"]["import and fonts"].append(1e3 * (time.perf_counter() - start))
    for number in range(2 * prompts):
        kind = "first" if not number else "same layers" if number < prompts else "other layers"
        report = Report("UNetModel", "quantized", decisions=decisions(layers, number >= prompts and number % 2 == 0))
        if kind == "other layers":
            report.decisions[1] = dataclasses.replace(report.decisions[1], sensitivity=0.01 + number / 1e4)
        snapshot = Snapshot((report,), {FLOAT: Pace(184.0, 20), QUANTIZED: Pace(97.0 + number / 10, 20 + 20 * number)})
        prompt(summary, snapshot, folder, lambda part, ms, kind=kind: found[kind][part].append(ms))  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the Report node.")
    parser.add_argument("--layers", type=int, default=794)
    parser.add_argument("--prompts", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(options.layers, options.prompts, Path(folder))
    table = Table("", *PARTS, title=f"the Report node with {options.layers} layers, milliseconds")
    for part in ("import and fonts", "line", "table", "chart", "image", "file", "all"):
        values = [found[kind].get(part) for kind in PARTS]
        table.add_row(part, *(f"{statistics.median(value):.1f}" if value else "" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()
