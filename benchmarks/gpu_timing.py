"""Times of a call on an NVIDIA GPU, by the wall clock and by the GPU's, directly and as one CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch


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
