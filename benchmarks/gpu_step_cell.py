"""What ``gpu_step`` measures, and one cell of it: one model at one size in one column, measured in this process."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import peak_memory
from benchmarks.cells import READY, emit, say
from benchmarks.gpu_kernels import kernel_summary, kernels, trace
from benchmarks.gpu_timing import captured, event_times, require_cuda, spread, wall_times, warm_up_for_capture
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
        print(READY, flush=True)
        sys.stdin.readline()


def relative_error_of(run: Callable[[], torch.Tensor], saved: Path) -> float:
    """The relative error of a replayed graph's result."""
    result = run()
    torch.cuda.synchronize()
    return relative_error(result, torch.load(saved, map_location="cuda"))
