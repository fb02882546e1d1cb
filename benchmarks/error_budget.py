"""Whether a step's error is what its layers' own quantization explains: each layer alone in 8 bit, and all together.

    python benchmarks/error_budget.py --model sdxl --device cuda --dtype float16
    python benchmarks/error_budget.py --model sdxl-small --precision int8 --threshold 20

Errors of independent roundings add up as squares do: with ``e_i`` the error of the step's output when layer ``i`` alone
is in 8 bit, about ``sqrt(sum(e_i ** 2))`` is to be expected of all together. A compiled step with much more than that
has a fault somewhere else: in a kernel, a scale or a fusion. Errors are relative, ``||result - eager|| / ||eager||``,
of one step with random weights.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
import onlinequant_backend as oq
from benchmarks.models import build, model_parser, relative_error, thresholds

_SHOWN = 10


@torch.no_grad()
def measure(model: torch.nn.Module, inputs: dict[str, object], options: dict[str, object]) -> tuple[float, oq.Report]:
    """The relative error of a compiled step, and the report with the error that each layer makes alone."""
    expected = model(**inputs)[0]
    oq.reset()
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as cache:
        options = {**options, "calibration_steps": 1, "sensitivity": "end_to_end", "cache_dir": cache}
        step = torch.compile(model, backend=oq.onlinequant, options=options)
        step(**inputs)
        error = relative_error(step(**inputs)[0], expected)
    return error, oq.reports()[-1]


def table(title: str, alone: dict[str, float], error: float) -> Table:
    """The layers that matter most, the sum of all, and the error of the compiled step."""
    result = Table(title=title)
    result.add_column("layers in 8 bit")
    result.add_column("relative error", justify="right")
    largest = sorted(alone, key=lambda name: -alone[name])[:_SHOWN]
    for name in largest:
        result.add_row(name, f"{alone[name]:.4f}")
    result.add_section()
    explained = math.sqrt(sum(value**2 for value in alone.values()))
    result.add_row(f"each of the {len(alone)} alone, added up as squares", f"{explained:.4f}")
    result.add_row("all of them, compiled", f"{error:.4f}")
    result.add_row("of what is explained", f"{error / explained:.2f}x")
    return result


def main() -> None:
    parser = model_parser(__doc__, "sdxl-small")
    parser.add_argument("--precision", default="auto", choices=["auto", "int8", "fp8"])
    parser.add_argument("--threshold", type=float, help="of compute density, for both kinds of layers")
    options = parser.parse_args()
    model, inputs = build(options.model, options.device, getattr(torch, options.dtype), batch=2)
    backend: dict[str, object] = {"precision": options.precision}
    if options.threshold is not None:
        backend.update(thresholds(options.threshold))
    with torch.no_grad():
        rms = float(model(**inputs)[0].float().square().mean().sqrt())
    error, report = measure(model, inputs, backend)
    alone = {d.name: math.sqrt(d.mse) / rms for d in report.decisions if d.quantized and d.mse is not None}
    if not alone:
        sys.exit(f"No layer is in 8 bit: {report.precision_reason}. Try --precision int8 and --threshold 20.")
    title = f"{options.model}, {options.dtype} on {options.device}, {report.precision}"
    Console(width=100).print(table(title, alone, error))


if __name__ == "__main__":
    main()
