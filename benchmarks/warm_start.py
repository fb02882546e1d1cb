"""How long a process takes to its first quantized step: with an empty cache, and with what an earlier process left.

    python benchmarks/warm_start.py --models sdxl-small sd15

Every row is a process of its own; "cold" starts from an empty cache directory, "warm" is another process on the same
one. Dynamo's tracing, which no backend can save, is shown apart. "first calls" are all calls up to and including the
first in 8 bit (for torch.compile: the first call); "beyond Dynamo" is what remains of them without the tracing. The
second table says where ours spends it: each part without those within it. "imports" are modules that the first calls
import, such as Inductor; "step" is running the compiled graph for the first time. The third is torch's own account.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()
_MOST_REPEATED = 4
_SHOWN = 0.05  # seconds, the least of a part that is shown

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.models import MODELS, build, relative_error  # noqa: E402


class Parts:
    """Seconds that one thread spends in functions, each without those among them that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[tuple[str, list[float]]] = []  # each with the seconds of the parts within it
        self._thread = threading.get_ident()

    def time(self, part: str, owner: Any, name: str, not_within: str | None = None) -> None:
        """Count the function ``name`` of a module or class to ``part`` from now on, unless the part ``not_within`` has
        called it."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            is_part_of = self._running[-1][0] if self._running else None
            if threading.get_ident() != self._thread or (is_part_of is not None and is_part_of == not_within):
                return function(*args, **kwargs)
            with self.running(part):
                return function(*args, **kwargs)

        setattr(owner, name, timed)
        self.seconds.setdefault(part, 0.0)

    @contextlib.contextmanager
    def running(self, part: str) -> Iterator[None]:
        """Count the block to ``part``."""
        start = time.perf_counter()
        self._running.append((part, []))
        try:
            yield
        finally:
            within = sum(self._running.pop()[1])
            took = time.perf_counter() - start
            self.seconds[part] = self.seconds.get(part, 0.0) + took - within
            if self._running:
                self._running[-1][1].append(took)


def watched() -> Parts:
    """The parts of this backend's first calls. Imports nothing that these calls import."""
    import importlib._bootstrap

    from onlinequant_backend import quantizing_backend
    from onlinequant_backend.analysis import graph_key, traced_graph
    from onlinequant_backend.compilation import build, compiled_graph, cuda_graphs, inductor_job, region_check
    from onlinequant_backend.kernels.nvidia import precompile
    from onlinequant_backend.quantization import float_weights, host_weights, layer_state, weight_set
    from onlinequant_backend.runtime import cache_entry, drift_watch, weight_state
    from onlinequant_backend.selection import layer_choice, layer_timing
    from onlinequant_backend.torch_internals import inductor_interface

    parts = Parts()
    owners: dict[str, list[tuple[Any, str]]] = {
        "Dynamo": [(torch._dynamo.convert_frame, "_compile")],
        "analysis": [(torch._dynamo.output_graph.OutputGraph, "call_user_compiler")],
        "cache lookup": [(weight_state.WeightStates, "entry"), (cache_entry.Entry, "restore")],
        "cache writing": [(weight_state.WeightStates, "publish")],
        "fingerprints": [(graph_key, "fingerprint")],
        "passes": [(module, "run_passes") for module in (quantizing_backend, build, layer_choice, traced_graph)],
        "saved weights": [(weight_state.WeightStates, name) for name in ("saved_weights", "_save_weights")],
        "weights": [(weight_set.WeightSet, name) for name in ("quantize", "merge", "extra", "select")],
        "moving weights": [(float_weights.FloatWeights, "move_to_host")],
        "page-locking": [(host_weights._Block, "__init__")],
        "kernels ahead": [(layer_timing, "compile_ahead"), (precompile, "threads"), (inductor_job, "compile_job")],
        "timing": [(layer_timing, "measure")],
        "sensitivity": [(layer_state.Layer, "measure_sensitivity")],
        "rewriting": [(build, "_build")],
        "Inductor": [(inductor_interface, "compile_fx")],
        "comparing": [
            *((region_check.Reference, name) for name in ("__init__", "check")),
            (drift_watch.DriftWatch, "_compare"),
        ],
        "repeated in float": [(drift_watch.DriftWatch, "_follow")],
        "kernels": [
            *_loaded("triton.runtime.jit", "JITFunction", "_do_compile"),
            *_loaded("triton.compiler.compiler", "CompiledKernel", "_init_handles"),
        ],
        "CUDA graphs": [(cuda_graphs._Lane, "record")],
        "step": [(compiled_graph.CompiledGraph, name) for name in ("__call__", "count")],
    }
    for part, functions in owners.items():
        for owner, name in functions:
            parts.time(part, owner, name)
    # Called for each module that is not imported yet.
    parts.time("imports", importlib._bootstrap, "_find_and_load", not_within="Dynamo")
    return parts


def _loaded(module: str, kind: str, name: str) -> list[tuple[Any, str]]:
    """A method, if its module is imported and has it."""
    owner = getattr(sys.modules.get(module), kind, None)
    return [(owner, name)] if hasattr(owner, name) else []


@torch.no_grad()
def run(row: argparse.Namespace) -> dict[str, Any]:
    """Measure one process."""
    import onlinequant_backend

    imported = time.perf_counter() - _STARTED
    model, inputs = build(row.model, row.device, getattr(torch, row.dtype), batch=1)
    options = {"precision": row.precision, "calibration_steps": row.calibration_steps}
    options["save_weights"] = row.save_weights
    if row.backend == "onlinequant":
        step = torch.compile(model, backend="onlinequant", options=options)
    else:
        step = torch.compile(model)
    parts = watched()
    start = time.perf_counter()
    calls = 0
    while True:
        result = step(**inputs)[0]
        calls += 1
        reports = onlinequant_backend.reports()
        # The first 8-bit call may be repeated in float, to see whether its ranges are right.
        if not reports or reports[-1].phase == "quantized" or calls >= row.calibration_steps + _MOST_REPEATED:
            break
    if row.device == "cuda":
        with parts.running("waiting"):
            torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.save(result, row.folder / f"{row.backend}-{row.state}.pt")
    metrics = torch._dynamo.utils.compilation_time_metrics
    counters = torch._dynamo.utils.counters
    return {
        "import": imported,
        "first": first,
        "dynamo": sum(metrics["_compile.compile_inner"]) - sum(metrics["OutputGraph.call_user_compiler"]),
        "calls": calls,
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "phase": reports[-1].phase if reports else "",
        "observed": reports[-1].calls_observed if reports else "",
        "hit": reports[-1].cache_hit if reports else "",
        "parts": parts.seconds,
        "torch": {name: sum(times) for name, times in metrics.items()},
    }


def in_process(model: str, backend: str, state: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One row in a fresh process, whose caches all lie in ``folder``."""
    arguments = ["--row", "--model", model, "--backend", backend, "--state", state, "--folder", str(folder)]
    arguments += ["--device", options.device, "--dtype", options.dtype, "--precision", options.precision]
    arguments += ["--calibration-steps", str(options.calibration_steps)]
    arguments += ["--save-weights"] if options.save_weights else []
    environment = {**os.environ, "ONLINEQUANT_CACHE_DIR": str(folder / "ours")}
    if backend == "torch.compile":
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{backend}, {state}: exit status {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(model: str, rows: dict[tuple[str, str], dict[str, Any]], folder: Path, options: argparse.Namespace) -> Table:
    """The rows of one model; percentages are of the same backend's cold process."""
    threads = torch.get_num_threads()
    result = Table(title=f"{model}, batch 1, {options.dtype}, {options.device}, {threads} threads; seconds")
    headings = "import, Dynamo, first calls, beyond Dynamo, of cold, calls, observed, compiled, difference"
    result.add_column("")
    for heading in headings.split(", "):
        result.add_column(heading, justify="right", no_wrap=True)
    for (backend, state), row in rows.items():
        cold = rows[backend, "cold"]
        beyond = row["first"] - row["dynamo"]
        first, this = (torch.load(folder / f"{backend}-{kind}.pt") for kind in ("cold", state))
        result.add_row(
            f"{backend}, {state}",
            f"{row['import']:.1f}",
            f"{row['dynamo']:.1f}",
            f"{row['first']:.1f}",
            f"{beyond:.1f}",
            f"{beyond / (cold['first'] - cold['dynamo']):.1%}",
            str(row["calls"]),
            str(row["observed"]),
            str(row["misses"]),
            f"{relative_error(this, first):.1e}",
        )
    return result


def breakdown(model: str, rows: dict[tuple[str, str], dict[str, Any]]) -> Table:
    """Where the seconds go in the processes of this backend, and their share of torch.compile's cold one."""
    ours = {state: row for (backend, state), row in rows.items() if backend == "onlinequant"}
    result = Table(title=f"{model}: where the seconds go", caption="seconds")
    for heading in ("", *ours):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    parts = {state: {"import": row["import"], **row["parts"]} for state, row in ours.items()}
    together = {state: row["import"] + row["first"] for state, row in ours.items()}
    for state in ours:
        parts[state]["all else"] = together[state] - sum(parts[state].values())
    for part in dict.fromkeys(name for found in parts.values() for name in found):
        seconds = [found.get(part, 0.0) for found in parts.values()]
        if max(seconds) >= _SHOWN:
            result.add_row(part, *(f"{each:.2f}" for each in seconds))
    result.add_row("together", *(f"{each:.2f}" for each in together.values()))
    beyond = [sum(parts[state][part] for part in ("import", "imports", "Dynamo")) for state in ours]
    result.add_row(
        "beyond imports and Dynamo",
        *(f"{all_ - less:.2f}" for all_, less in zip(together.values(), beyond, strict=True)),
    )
    plain = rows.get(("torch.compile", "cold"))
    if plain:
        of = plain["import"] + plain["first"]
        result.add_row("of torch.compile, cold", *(f"{each / of:.0%}" for each in together.values()))
    result.add_row("the last call's phase", *(row["phase"] for row in ours.values()))
    return result


def by_torch(model: str, rows: dict[tuple[str, str], dict[str, Any]]) -> Table:
    """What torch says of the processes of this backend beyond Dynamo, each part with those within it."""
    ours = {state: row["torch"] for (backend, state), row in rows.items() if backend == "onlinequant"}
    result = Table(title=f"{model}: as torch counts it, parts within parts")
    for heading in ("", *ours):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name in sorted({name for found in ours.values() for name in found}):
        seconds = [found.get(name, 0.0) for found in ours.values()]
        if max(seconds) >= _SHOWN:
            result.add_row(name, *(f"{each:.2f}" for each in seconds))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sdxl-small", "sd15"], choices=MODELS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--calibration-steps", type=int, default=2)
    parser.add_argument("--save-weights", action="store_true", help="the option save_weights")
    parser.add_argument("--backends", nargs="+", default=["onlinequant", "torch.compile"])
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    for name in ("--model", "--backend", "--state"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(run(options)))
        return
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            rows = {}
            for backend in options.backends:
                for state in ("cold", "warm"):
                    print(f"measuring {model}: {backend}, {state}", file=sys.stderr)
                    rows[backend, state] = in_process(model, backend, state, Path(name), options)
                    print(f"  {rows[backend, state]}", file=sys.stderr)
            console = Console(width=140)
            console.print(table(model, rows, Path(name), options))
            if "onlinequant" in options.backends:
                console.print(breakdown(model, rows))
                console.print(by_torch(model, rows))


if __name__ == "__main__":
    main()
