"""One step of real denoisers on an NVIDIA GPU in float16: eager, torch.compile, torchao and onlinequant side by side.

    python benchmarks/gpu_step.py --rows sdxl-1024-b2 sd15-512-b2 --json results.jsonl --profile

Every cell (a row's model at its size, in one column) is a process of its own, all on one machine; all make the same
random weights and inputs from the same seed. One after the other, each alone on the GPU, they are measured; with
``--together`` those of a row, torchao's after the others, compile at the same time before that, which disturbs only
"first s" and saves minutes. Times are medians with their spread.

- "direct": wall-clock time of a call as a user makes it, in batches of calls that are synchronized at their end.
- "as a graph": the same function captured by hand in one CUDA graph, between CUDA events around each replay. For
  torch.compile and torchao that is the fastest they can do; eager's is for information only: its users have no graph.
  onlinequant replays graphs of its own, so for it the events go around batches of direct calls.
- Speed-ups of a line are of its time as a graph (eager's: of its direct calls), over torch.compile as a graph,
  torch.compile called directly, eager called directly, and torchao as a graph.
- "relative error": ``||result - eager|| / ||eager||`` of the step's output.
- "GiB": the peak of allocated and of reserved memory in timed calls. What a CUDA graph needs for intermediate results
  is sure to be in the second number only.
- "first s": seconds from the first call to the first compiled result, for onlinequant with the observed calls. Caches
  are empty. "first GiB": the peaks of memory meanwhile.

"torchao" is what its documentation recommends for float8 on such a GPU: dynamic scales for activations, one for each
tensor (one for each row needs bfloat16), in every linear layer whose sizes are multiples of 16, with the options it
sets for Inductor (``--torchao-untuned``: without, which compiles in half the time). "torchao large linears" leaves out
the layers that diffusers' SDXL tutorial leaves out. Both are compiled in torch.compile's default mode, since
max-autotune takes many minutes a model.

Kernels are counted in a trace of the profiler. ``--profile`` lists them one by one, too. ``--show FILE`` prints the
tables of what several runs have appended to a file; it needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import peak_memory
from benchmarks.models import build, relative_error


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of ``benchmarks.models``, height and width of its latent image, and what to call that."""

    model: str
    batch: int
    size: tuple[int, int]
    title: str


ROWS = {
    "sdxl-1024-b2": Row("sdxl", 2, (128, 128), "SDXL, 1024x1024, batch 2"),
    "sdxl-512-b8": Row("sdxl", 8, (64, 64), "SDXL, 512x512, batch 8"),
    "sd15-512-b2": Row("sd15", 2, (64, 64), "SD1.5, 512x512, batch 2"),
    "sd15-512-b8": Row("sd15", 8, (64, 64), "SD1.5, 512x512, batch 8"),
    "svd-576x1024": Row("svd", 2, (72, 128), "SVD, 25 frames of 576x1024, batch 2"),
}
EAGER, COMPILED, TORCHAO, TORCHAO_LARGE, OURS = COLUMNS = (
    "eager",
    "torch.compile",
    "torchao",
    "torchao large linears",
    "onlinequant",
)
# Sizes of linear layers, inputs and outputs, for which 8 bit does not pay according to diffusers' SDXL tutorial.
SMALL_LINEARS = {
    *((1280, 640), (1920, 1280), (1920, 640), (2048, 1280), (2048, 2560), (2560, 1280), (256, 128), (2816, 1280)),
    *((320, 640), (512, 1536), (512, 256), (512, 512), (640, 1280), (640, 1920), (640, 320), (640, 5120), (640, 640)),
    *((960, 320), (960, 640)),
}
REPLAYS = 25
BATCHES = 7  # of direct calls between CUDA events
PROFILED = 3
MOST_CALLS = 200  # until the first result in 8 bit
_READY = "ready to be measured"
CATEGORIES = ("attention", "conv", "gemm", "pointwise, reduction", "copy, memset", "other")
# What a kernel does, by its name; the first that matches.
_PATTERNS = tuple(
    (re.compile(pattern, re.IGNORECASE), category)
    for pattern, category in (
        (r"^triton_tem_.*conv", "conv"),
        (r"^triton_tem_.*(flex|attention)", "attention"),
        (r"^triton_tem_", "gemm"),
        (r"^triton_", "pointwise, reduction"),
        (r"^_(conv|gather|add_up)_kernel", "conv"),  # ours, as are _matmul_kernel and _geglu_kernel
        (r"flash|fmha|attention|sdpa|softmax_warp|\bmha", "attention"),
        (r"nchwToNhwc|nhwcToNchw|memcpy|memset|copy", "copy, memset"),
        (r"conv|fprop|dgrad|wgrad|implicit|winograd|im2col|cudnn", "conv"),
        (r"gemm|gemv|nvjet|matmul|geglu|splitk|scaled_mm|cutlass|cublas|_mm_|ampere_|hopper_", "gemm"),
        (
            r"elementwise|reduce|norm|moments|fusedparams|softmax|upsample|welford|fill|index|gelu|silu",
            "pointwise, reduction",
        ),
    )
)


def require_cuda() -> None:
    """End the program with a clear message if there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise SystemExit(f"This benchmark needs an NVIDIA GPU, and torch {torch.__version__} sees none.")


def spread(milliseconds: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    values = sorted(milliseconds)
    return {"median": statistics.median(values), "low": values[0], "high": values[-1]}


def wall_times(step: Callable[[], Any], calls: int, repeats: int) -> list[float]:
    """Milliseconds of a call, for each batch of calls; three batches are enough where they take long."""
    times: list[float] = []
    while len(times) < repeats and not (len(times) >= 3 and sum(times) * calls > 10_000):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return times


def event_times(step: Callable[[], Any], calls: int, repeats: int) -> list[float]:
    """Milliseconds of a call by the GPU's clock, for each batch of calls."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in pairs:
        start.record()
        for _ in range(calls):
            step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / calls for start, end in pairs]


def warm_up_for_capture(step: Callable[[], Any]) -> None:
    """Call ``step`` on a side stream, as captures are made on one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """``step`` as one CUDA graph, whose result is overwritten by the next call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def trace(step: Callable[[], Any], calls: int, activity: torch.profiler.ProfilerActivity) -> list[dict[str, Any]]:
    """The profiler's events of so many calls, in the format of Chrome's traces."""
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with torch.profiler.profile(activities=[activity], schedule=schedule) as profiler:
        step()
        torch.cuda.synchronize()
        profiler.step()
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return list(json.loads(path.read_text(errors="replace"))["traceEvents"])


def category(name: str) -> str:
    """Which of ``CATEGORIES`` the kernel of this name belongs to."""
    return next((found for pattern, found in _PATTERNS if pattern.search(name)), "other")


def kernels(events: Iterable[dict[str, Any]], calls: int) -> list[dict[str, Any]]:
    """What ran on the GPU, the longest first, with launches and milliseconds of one call."""
    durations: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            group = category(event["name"]) if event["cat"] == "kernel" else "copy, memset"
            durations.setdefault((event["name"], group), []).append(float(event["dur"]))
    rows = [
        {
            "name": name[:300],
            "category": group,
            "launches": len(times) / calls,
            "ms": sum(times) / calls / 1e3,
            "mean_us": statistics.fmean(times),
        }
        for (name, group), times in durations.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def kernel_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals of what ``kernels`` returns."""
    return {
        "ms": sum(row["ms"] for row in rows),
        "launches": sum(row["launches"] for row in rows),
        "distinct": len(rows),
        "distinct_triton": sum(row["name"].startswith("triton_") for row in rows),
        "categories": {
            name: {
                "ms": sum(row["ms"] for row in rows if row["category"] == name),
                "launches": sum(row["launches"] for row in rows if row["category"] == name),
            }
            for name in CATEGORIES
        },
    }


def compiled(options: argparse.Namespace, model: torch.nn.Module) -> Callable[..., Any]:
    """The model as one column runs it, short of a graph captured by hand."""
    if options.column == EAGER:
        return model
    if options.column in (TORCHAO, TORCHAO_LARGE):
        quantize_with_torchao(model, options.column == TORCHAO_LARGE, not options.torchao_untuned)
    if options.column != OURS:
        return torch.compile(model)
    return torch.compile(model, backend="onlinequant", options={"calibration_steps": 2, **dict(options.option)})


def quantize_with_torchao(model: torch.nn.Module, only_large: bool, tuned: bool) -> None:
    """Dynamic float8 for linear layers, in place."""
    torchao: Any = importlib.import_module("torchao.quantization")

    def is_chosen(module: torch.nn.Module, _name: str) -> bool:
        if not isinstance(module, torch.nn.Linear) or module.in_features % 16 or module.out_features % 16:
            return False
        return not only_large or (module.in_features, module.out_features) not in SMALL_LINEARS

    count = sum(is_chosen(module, "") for module in model.modules())
    config = torchao.Float8DynamicActivationFloat8WeightConfig(set_inductor_config=tuned)
    torchao.quantize_(model, config, filter_fn=is_chosen)
    say(f"torchao quantized {count} linear layers")


def first_result(step: Callable[[], torch.Tensor], is_ours: bool) -> tuple[torch.Tensor, float, int]:
    """The first result of the compiled model, after how many seconds and which calls."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for calls in range(1, MOST_CALLS + 1):
        result = step()
        if not is_ours or is_settled():
            torch.cuda.synchronize()
            return result.clone(), time.perf_counter() - start, calls
    raise SystemExit(f"onlinequant was still not in 8 bit after {MOST_CALLS} calls")


def is_settled() -> bool:
    """Whether every graph has been compiled, in 8 bit or in float."""
    import onlinequant_backend

    reports = onlinequant_backend.reports()
    return bool(reports) and all(report.phase in ("quantized", "float") for report in reports)


def our_report() -> dict[str, Any]:
    """What onlinequant made of the model's largest graph."""
    import onlinequant_backend

    report = max(onlinequant_backend.reports(), key=lambda report: len(report.decisions))
    counts = report.counts()
    return {
        "phase": report.phase,
        "phase_reason": report.phase_reason,
        "precision": report.precision,
        "graphs": len(onlinequant_backend.reports()),
        "compile_seconds": report.compile_seconds,
        "layers": counts["quantized_conv"] + counts["quantized_linear"],
        **counts,
    }


@torch.no_grad()
def measure(options: argparse.Namespace) -> None:
    """Measure one cell in this process. Prints what is known so far as one JSON object, as often as more is known."""
    require_cuda()
    row, column = ROWS[options.row], options.column
    cell: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "notes": []}
    start = time.perf_counter()
    config = {"transformer_layers_per_block": [1, 2, options.small_depth]} if row.model == "sdxl" else {}
    model, inputs = build(row.model, "cuda", torch.float16, row.batch, size=row.size, config=config)
    say(f"built in {time.perf_counter() - start:.0f} s")
    saved = options.folder / f"{options.row}.pt"
    if saved.exists():
        expected = torch.load(saved, map_location="cuda")
    else:
        expected = model(**inputs)[0].clone()
        own = saved.with_suffix(f".{os.getpid()}")  # the other columns may be doing the same
        torch.save(expected, own)
        own.replace(saved)
    function = compiled(options, model)

    def step() -> torch.Tensor:
        return function(**inputs)[0]

    peak_memory.start("cuda")
    result, cell["first_seconds"], cell["first_calls"] = first_result(step, column == OURS)
    cell["first_memory"] = peak_memory.peaks("cuda")
    say(f"first result after {cell['first_seconds']:.1f} s")
    if column == OURS:
        cell["report"] = our_report()
    wait_for_turn(options)
    for _ in range(5):  # graphs of onlinequant's own are recorded in the first of them
        result = step()
    cell["relative_error"] = relative_error(result, expected)
    del result, expected
    emit(cell)

    peak_memory.start("cuda")
    cell["direct"] = spread(wall_times(step, options.calls, options.repeats))
    run = step
    if column == OURS:
        cell["graph"] = spread(event_times(step, options.calls, BATCHES))
    else:
        try:
            warm_up_for_capture(step)
            peak_memory.start("cuda")
            run = captured(step)
        except RuntimeError as error:
            cell["notes"].append(f"{column} cannot be captured in a CUDA graph: {error}")
        else:
            cell["graph"] = spread(event_times(run, 1, REPLAYS))
            cell["relative_error"] = relative_error_of(run, saved)
    cell["memory"] = peak_memory.peaks("cuda")
    emit(cell)

    rows = kernels(trace(run, PROFILED, torch.profiler.ProfilerActivity.CUDA), PROFILED)
    if rows:
        cell["kernels"] = kernel_summary(rows)
        if options.profile:
            cell["profile"] = rows
    else:
        cell["notes"].append("the profiler saw no kernels")
    emit(cell)


def wait_for_turn(options: argparse.Namespace) -> None:
    """Until this process may have the GPU for itself."""
    if options.together:
        print(_READY, flush=True)
        sys.stdin.readline()


def relative_error_of(run: Callable[[], torch.Tensor], saved: Path) -> float:
    """The relative error of a replayed graph's result."""
    result = run()
    torch.cuda.synchronize()
    return relative_error(result, torch.load(saved, map_location="cuda"))


def emit(cell: dict[str, Any]) -> None:
    print(json.dumps(cell), flush=True)


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


class Cell:
    """The process that measures one cell."""

    def __init__(self, row: str, column: str, options: argparse.Namespace, folder: Path) -> None:
        self._output: list[str] = []
        self._ending: str | None = None
        environment, self._is_warm = caches(row, column, options, folder)
        arguments = ["--row", row, "--column", column, "--folder", str(folder)]
        for name in ("calls", "repeats", "small_depth"):
            arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        for name in ("profile", "together", "torchao_untuned"):
            arguments += [f"--{name.replace('_', '-')}"] * getattr(options, name)
        for key, value in options.option:
            arguments += ["--option", f"{key}={json.dumps(value)}"]
        command = [sys.executable, __file__, *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, errors="replace"
        )
        self._timer = threading.Timer(options.timeout, self._stop, [f"took more than {options.timeout:.0f} s"])
        self._timer.start()

    def _stop(self, ending: str) -> None:
        self._ending = ending
        self._process.kill()

    def wait_until_ready(self) -> None:
        """Until it has compiled, or failed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == _READY:
                return
            self._output.append(line)

    def finish(self) -> dict[str, Any]:
        """Let it measure; a failure becomes a cell that says so, with what was measured before it."""
        rest, _ = self._process.communicate("\n")
        self._timer.cancel()
        if self._ending is None and self._process.returncode:
            self._ending = f"exit status {self._process.returncode}"
        return {**last_object("".join(self._output) + rest, self._ending), "warm": self._is_warm}


def cells_of(row: str, options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cells of a row by column, as they are finished, each from a fresh process."""
    columns = sorted(set(options.columns), key=COLUMNS.index)
    if importlib.util.find_spec("torchao") is None:
        for column in {TORCHAO, TORCHAO_LARGE}.intersection(columns):
            columns.remove(column)
            yield column, {"failed": "torchao is not installed"}
    slow = [column for column in columns if column in (TORCHAO, TORCHAO_LARGE)]  # others would wait for minutes
    quick = [column for column in columns if column not in slow]
    for together in filter(None, (quick, slow)) if options.together else [[column] for column in columns]:
        print(f"measuring {row}: {', '.join(together)}", file=sys.stderr, flush=True)
        cells = {column: Cell(row, column, options, folder) for column in together}
        if options.together:
            for cell in cells.values():
                cell.wait_until_ready()
        for column, cell in cells.items():
            yield column, cell.finish()


def last_object(output: str, ending: str | None) -> dict[str, Any]:
    """The last whole line of a process's output that is a JSON object; ``ending``: what went wrong, if anything."""
    for line in reversed(output.splitlines()):
        try:
            cell = json.loads(line)
        except ValueError:
            continue
        if isinstance(cell, dict):
            if ending is not None:
                cell["notes"] = [*cell.get("notes", ()), ending]
                if "direct" not in cell:
                    cell["failed"] = ending
            return cell
    return {"failed": ending or "printed nothing"}


def caches(row: str, column: str, options: argparse.Namespace, folder: Path) -> tuple[dict[str, str], bool]:
    """The environment in which all caches lie in a folder of their own, and whether there is anything in it already."""
    name = re.sub(r"\W+", "-", f"{row}-{options.small_depth}-{column}-{options.torchao_untuned}")
    home = (options.cache or folder / "caches") / name
    is_warm = home.exists()
    home.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    environment["TRITON_HOME"] = environment["ONLINEQUANT_CACHE_DIR"] = str(home)
    if column == OURS:
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # else it would take the place of onlinequant's own
    else:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(home / "inductor")
    # Older CUPTI libraries crash if they are set up again once there are CUDA graphs.
    environment.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    environment.setdefault("TEARDOWN_CUPTI", "0")
    return environment, is_warm and column != EAGER


def median(cell: dict[str, Any], name: str) -> float | None:
    """Milliseconds of a cell's "direct" or "graph"."""
    return float(cell[name]["median"]) if name in cell else None


def table(title: str, cells: dict[str, dict[str, Any]]) -> Table:
    """The columns of one row of ``ROWS``, one a line."""
    result = Table(title=title)
    headings = ["", "direct ms (min-max)", "as a graph ms (min-max)", "to compile's graph", "to compile", "to eager"]
    headings += ["to torchao", "relative error", "GiB", "first s", "first GiB", "triton_*", "launches", "8-bit layers"]
    for heading in headings:
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for column, cell in cells.items():
        if "failed" in cell:
            result.add_row(column, cell["failed"])
            continue
        mine = median(cell, "direct" if column == EAGER else "graph")
        ratios = []
        for base, name in ((COMPILED, "graph"), (COMPILED, "direct"), (EAGER, "direct"), (TORCHAO, "graph")):
            theirs = median(cells.get(base, {}), name)
            ratios.append("" if mine is None or theirs is None else f"{theirs / mine:.2f}x")
        counts, report = cell.get("kernels", {}), cell.get("report", {})
        result.add_row(
            column,
            shown(cell.get("direct")),
            shown(cell.get("graph")),
            *ratios,
            "" if column == EAGER else f"{cell['relative_error']:.4f}",
            shown_memory(cell.get("memory")),
            "" if column == EAGER else f"{cell['first_seconds']:.0f}" + (" warm" if cell.get("warm") else ""),
            shown_memory(cell.get("first_memory")),
            str(counts.get("distinct_triton", "")),
            f"{counts['launches']:.0f}" if counts else "",
            f"{report['layers']} {report['precision']}" if report else "",
        )
    return result


def shown(times: dict[str, float] | None) -> str:
    if times is None:
        return ""
    digits = 1 if times["median"] >= 100 else 2
    return f"{times['median']:.{digits}f} ({times['low']:.{digits}f}-{times['high']:.{digits}f})"


def shown_memory(peaks: dict[str, float] | None) -> str:
    return "" if peaks is None else f"{peaks['allocated']:.2f} / {peaks['reserved']:.2f}"


def category_table(title: str, cells: dict[str, dict[str, Any]]) -> Table:
    """Milliseconds and launches of each category of kernels, for each column that was traced."""
    traced = {column: cell["kernels"] for column, cell in cells.items() if "kernels" in cell}
    result = Table(title=f"{title}: ms of a step's kernels, and launches")
    result.add_column("")
    for column in traced:
        result.add_column(column, justify="right")
    for name in CATEGORIES:
        groups = [counts["categories"][name] for counts in traced.values()]
        result.add_row(name, *(f"{group['ms']:.2f}  {group['launches']:5.0f}" for group in groups))
    result.add_section()
    result.add_row("all", *(f"{counts['ms']:.2f}  {counts['launches']:5.0f}" for counts in traced.values()))
    result.add_row("distinct kernels", *(str(counts["distinct"]) for counts in traced.values()))
    return result


def top_table(title: str, rows: list[dict[str, Any]], count: int = 25) -> Table:
    """The kernels that take longest."""
    result = Table(title=title)
    for heading in ("ms", "share", "launches", "mean us", "category", "kernel"):
        result.add_column(heading, justify="left" if heading in ("category", "kernel") else "right", no_wrap=True)
    total = sum(row["ms"] for row in rows)
    for row in rows[:count]:
        name = row["name"].removeprefix("void ")
        result.add_row(
            f"{row['ms']:.3f}",
            f"{row['ms'] / total:.1%}",
            f"{row['launches']:.0f}",
            f"{row['mean_us']:.1f}",
            row["category"],
            name if len(name) <= 110 else f"{name[:70]}...{name[-37:]}",
        )
    return result


def show(console: Console, title: str, cells: dict[str, dict[str, Any]]) -> None:
    """Everything about one row of ``ROWS``."""
    console.print(table(title, cells))
    for column, cell in cells.items():
        for note in cell.get("notes", ()):
            console.print(f"{column}: {note}", markup=False, highlight=False)
        if cell.get("report", {}).get("phase") == "float":
            console.print(f"{column} ran in float: {cell['report']['phase_reason']}", markup=False, highlight=False)
    if any("kernels" in cell for cell in cells.values()):
        console.print(category_table(title, cells))
    for column, cell in cells.items():
        if "profile" in cell:
            console.print(top_table(f"{title}: {column}", cell["profile"]))


def read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The cells that ``--json`` wrote, by title and column: of each the last that did not fail, if there is one."""
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        cell = json.loads(line)
        cells = tables.setdefault(cell["title"], {})
        if "failed" not in cell or "failed" in cells.get(cell["column"], {"failed": ""}):
            cells[cell["column"]] = cell
    return {
        title: dict(sorted(cells.items(), key=lambda item: COLUMNS.index(item[0]))) for title, cells in tables.items()
    }


def key_and_value(text: str) -> tuple[str, Any]:
    """``key=value``, where what is not JSON is a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = [column for column in COLUMNS if column != TORCHAO_LARGE]
    result.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    result.add_argument("--columns", nargs="+", default=defaults, choices=COLUMNS)
    result.add_argument("--json", type=Path, help="append each cell to this file, as one line, when it is finished")
    result.add_argument("--show", type=Path, help="print what --json wrote to this file, and measure nothing")
    result.add_argument("--profile", action="store_true", help="list the kernels, too")
    result.add_argument("--timeout", type=float, default=420, help="seconds for one cell")
    result.add_argument("--together", action="store_true", help="compile the columns of a row at the same time")
    result.add_argument("--calls", type=int, default=10, help="calls of a batch")
    result.add_argument("--repeats", type=int, default=5, help="batches; 3 if they take long")
    result.add_argument("--small-depth", type=int, default=10, help="transformer layers of SDXL's deepest blocks")
    result.add_argument("--option", action="append", default=[], type=key_and_value, help="key=value for onlinequant")
    result.add_argument("--torchao-untuned", action="store_true", help="without the Inductor options torchao sets")
    result.add_argument("--cache", type=Path, help="keep the caches in this folder and find them there again")
    result.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    result.add_argument("--column", choices=COLUMNS, help=argparse.SUPPRESS)
    result.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return result


def main() -> None:
    options = parser().parse_args()
    if options.row:
        measure(options)
        return
    console = Console(width=190)
    if options.show:
        for title, measured in read(options.show).items():
            show(console, title, measured)
        return
    require_cuda()
    with tempfile.TemporaryDirectory() as name:
        for row in options.rows:
            cells: dict[str, dict[str, Any]] = {}
            depth = f", depth {options.small_depth}" if options.small_depth != 10 and row.startswith("sdxl") else ""
            title = f"{ROWS[row].title}{depth}, float16"
            for column, cell in cells_of(row, options, Path(name)):
                cells[column] = cell
                brief = {key: value for key, value in cell.items() if key not in ("profile", "kernels")}
                say(json.dumps(brief))
                if options.json:
                    line = {"title": title, "row": row, "column": column, **cell}
                    line["options"] = dict(options.option) if column == OURS else {}
                    with options.json.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            show(console, title, dict(sorted(cells.items(), key=lambda item: COLUMNS.index(item[0]))))


if __name__ == "__main__":
    main()
