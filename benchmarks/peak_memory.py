"""The most memory that was in use since some moment: a GPU's, or on a CPU the process's own, on Linux."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


def start(device: str) -> None:
    """Give back what no tensor is in, which takes the next call time to get again, and forget the peaks."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)


def peaks(device: str) -> dict[str, float]:
    """GiB since ``start``: of a GPU "allocated" and "reserved", of a CPU "resident"."""
    if device.startswith("cuda"):
        found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    else:
        lines = Path("/proc/self/status").read_text().splitlines()
        kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        found = {"resident": kibibytes * 2**10}
    return {name: size / 2**30 for name, size in found.items()}


def peak(device: str) -> float:
    """GiB since ``start`` that a GPU's tensors took at most, or the process."""
    return next(iter(peaks(device).values()))
