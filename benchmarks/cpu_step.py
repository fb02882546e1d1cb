"""One SD1.5 UNet step on the CPU: eager, torch.compile, torchao and onlinequant side by side.

    python benchmarks/cpu_step.py --dtype float32 bfloat16

Every column runs in a process of its own, one after the other, so that peak memory is its own; all use the same seed,
and times are medians with their spread. "relative error" is against eager in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.models import GPU_THRESHOLDS, build, relative_error

OPTIONS = {"precision": "int8"}
COLUMNS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "torch.compile": None,
    "torchao int8 dynamic": None,
    "onlinequant, a GPU's thresholds": {**OPTIONS, **GPU_THRESHOLDS},
    "onlinequant": OPTIONS,
    "onlinequant, minmax": {**OPTIONS, "calibration_method": "minmax"},
}


def compiled(column: str, model: torch.nn.Module, calibration_steps: int) -> Callable[..., Any]:
    """The model as one column runs it."""
    if column == "eager":
        return model
    if column == "torch.compile":
        return torch.compile(model)
    if column == "torchao int8 dynamic":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return torch.compile(model)
    options = {"calibration_steps": calibration_steps, **(COLUMNS[column] or {})}
    return torch.compile(model, backend="onlinequant", options=options)


@torch.no_grad()
def run_column(column: str, dtype: str, steps: int, calibration_steps: int, folder: Path) -> dict[str, Any]:
    """Measure one column in this process."""
    model, inputs = build("sd15", "cpu", getattr(torch, dtype), batch=1)
    step = compiled(column, model, calibration_steps)
    start = time.perf_counter()
    for _ in range(calibration_steps + 1 if column.startswith("onlinequant") else 1):
        result = step(**inputs)[0]
    first = time.perf_counter() - start
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        result = step(**inputs)[0]
        seconds.append(time.perf_counter() - start)
    torch.save(result, folder / f"{dtype}-{column}.pt")
    row = {
        "first": first,
        "median": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if column.startswith("onlinequant"):
        import onlinequant_backend

        report = onlinequant_backend.reports()[-1]
        row["layers"] = sum(decision.quantized for decision in report.decisions)
        row["phase"] = report.phase
        row["recompiles"] = recompiles(step, inputs)
    return row


def recompiles(step: Callable[..., Any], inputs: dict[str, Any]) -> int:
    """New graphs that Dynamo makes when only the values change."""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for timestep in (1.0, 7.0):
        step(**{**inputs, "timestep": torch.full((1,), timestep)})
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] - before


def in_process(column: str, dtype: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one column in a fresh process; a failure becomes a row that says so."""
    arguments = ["--column", column, "--dtype", dtype, "--folder", str(folder), "--steps", str(options.steps)]
    arguments += ["--calibration-steps", str(options.calibration_steps)]
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(dtype: str, rows: dict[str, dict[str, Any]], folder: Path) -> Table:
    """The rows of one dtype beside the ratios to torch.compile."""
    result = Table(title=f"SD1.5 UNet, 64x64 latent, batch 1, {dtype}, {torch.get_num_threads()} threads")
    headings = ("", "ms (min-max)", "speed-up", "relative error", "peak GiB", "memory", "first s", "8-bit layers")
    for heading in headings:
        result.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    base = rows.get("torch.compile", {})
    eager = torch.load(folder / f"{dtype}-eager.pt") if "eager" in rows else None
    for column, row in rows.items():
        if "failed" in row:
            result.add_row(column, row["failed"])
            continue
        error = relative_error(torch.load(folder / f"{dtype}-{column}.pt"), eager) if eager is not None else None
        result.add_row(
            column,
            f"{1e3 * row['median']:.0f} ({1e3 * row['low']:.0f}-{1e3 * row['high']:.0f})",
            f"{base['median'] / row['median']:.2f}x" if "median" in base else "",
            "" if error is None else f"{error:.4f}",
            f"{row['memory']:.2f}",
            f"{row['memory'] / base['memory']:.2f}x" if "memory" in base else "",
            f"{row['first']:.0f}",
            str(row.get("layers", "")),
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--calibration-steps", type=int, default=2)
    parser.add_argument("--column", choices=list(COLUMNS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.column:
        row = run_column(options.column, options.dtype[0], options.steps, options.calibration_steps, options.folder)
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in options.dtype:
            rows = {}
            for column in options.columns:
                print(f"measuring {column} in {dtype}", file=sys.stderr)
                rows[column] = in_process(column, dtype, options, folder)
                print(f"  {rows[column]}", file=sys.stderr)
            Console(width=140).print(table(dtype, rows, folder))


if __name__ == "__main__":
    main()
