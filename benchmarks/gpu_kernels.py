"""Which kernels a call runs on an NVIDIA GPU, from a trace of the profiler, and what they are for by their names."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

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
