"""The most memory that was in use since some moment: a GPU's, or on a CPU the process's own, on Linux."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
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


class Watch(threading.Thread):
    """Watches what this process takes, every 5 ms, beside what torch's allocator counts.

    To be made before the process uses the GPU. "process" is the GPU's memory in use less what was in use before: of
    tensors, CUDA's context, kernels, libraries and CUDA graphs, and of whatever else is started on the GPU meanwhile.
    ``source`` is who says it: NVML if ``pynvml`` is installed, else CUDA, with nvidia-smi for what was free before.
    "host" is the process's resident memory. ``is_alone``: whether no other process uses the GPU; if one does, "process"
    is not known, and 0.
    """

    def __init__(self, device: str, is_alone: bool = True) -> None:
        super().__init__(daemon=True)
        self._device = device
        self._in_use, self.source = _memory_of_process(device if is_alone else "cpu")
        self._host = psutil.Process()
        self._most: dict[str, int] = {}

    def run(self) -> None:
        while True:
            self._look()
            time.sleep(0.005)

    def restart(self) -> None:
        """Give back what no tensor is in, and forget the peaks."""
        if self._device == "cuda":
            start("cuda")
        self._most = {}

    def peaks(self) -> dict[str, float]:
        """GiB since ``restart``: "allocated", "reserved" and "process" of the GPU, 0 without one, and "host"."""
        self._look()
        of_torch = peaks("cuda") if self._device == "cuda" else {"allocated": 0.0, "reserved": 0.0}
        return {**of_torch, **{name: size / 2**30 for name, size in self._most.items()}}

    def _look(self) -> None:
        most = self._most
        for name, size in (("process", self._in_use()), ("host", self._host.memory_info().rss)):
            most[name] = max(size, most.get(name, 0))


def _memory_of_process(device: str) -> tuple[Callable[[], int], str]:
    """What says how many bytes more of the GPU are in use than now, and its name."""
    if device != "cuda":
        return lambda: 0, "none"
    if importlib.util.find_spec("pynvml"):
        before = torch.cuda.device_memory_used(0)
        return lambda: torch.cuda.device_memory_used(0) - before, "NVML"
    free = _free_before()
    return lambda: free - torch.cuda.mem_get_info(0)[0], "CUDA"


def _free_before() -> int:
    """Bytes of the GPU that are free; to ask CUDA would take some of them."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", index]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 2**20
