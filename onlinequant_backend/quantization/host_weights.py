"""Float weights in host memory that a GPU reads where they are.

A weight that was moved there is a CUDA tensor in page-locked memory that is mapped into the GPU's address space ("zero
copy", CUDA C++ Programming Guide, "Mapped Memory"). It keeps its identity, shape, strides, dtype and version, and all
of PyTorch can read and write it. So LoRAs, state dicts, copies and moves work as before, while the GPU's memory is
free. Only reading is slow, as slow as the bus (55 GB/s on PCIe 5.0), so a layer that runs in float reads a copy that
``on_device`` makes just before.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy
import torch

from .. import fork_locks
from ..operating_system import free_memory
from ..tensors import extent, numbered

_log = logging.getLogger("onlinequant")

# Smaller weights stay on the GPU: they would not be worth a page or two and a copy for each float call.
_LEAST = 2**18
# The share of the host's memory that is left to others.
_RESERVE = 0.1
_THREADS = 8
_PART = 2**30  # bytes that are moved at a time from the host's ordinary memory
_MAPPED = 2  # cudaHostRegisterMapped
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_lock = fork_locks.rlock()
# By address, the memory of the weights on the host, and of those that were and are now tensors of the CPU.
_windows: weakref.WeakValueDictionary[int, _Window] = weakref.WeakValueDictionary()
_unused: list[_Block] = []  # without a weight, still page-locked


class HostMemoryError(MemoryError):
    """The host has too little memory that a GPU can read."""


def is_on_host(weight: torch.Tensor) -> bool:
    """Whether ``move_to_host`` has moved a weight, which is a CUDA tensor nevertheless."""
    window = _window(weight)
    return window is not None and weight.device == window.device


def was_on_host(weight: torch.Tensor) -> bool:
    """Whether a weight is on the host, or is a tensor of the CPU in the same memory."""
    return _window(weight) is not None


def are_any_on_host() -> bool:
    """Whether any weight of this process is on the host."""
    return bool(_windows)


def can_be_on_host(weight: torch.Tensor) -> bool:
    """Whether ``move_to_host`` can move a weight. Not one that is a part of a tensor: a change of the one would no
    longer be a change of the other."""
    return _is_worth_it(weight) and weight.untyped_storage().nbytes() == weight.nbytes and supports(weight.device)


def _is_worth_it(weight: torch.Tensor) -> bool:
    """Whether it is a plain tensor of some size without gaps in its memory."""
    return is_plain(weight) and weight.nbytes >= max(1, _LEAST) and extent(weight) == weight.numel()


def is_plain(weight: torch.Tensor) -> bool:
    """Whether it is an ordinary tensor with an address."""
    return type(weight) in _PLAIN and weight.layout is torch.strided and weight.device.type != "meta"


@functools.cache
def supports(device: torch.device) -> bool:
    """Whether a device can read host memory in place."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    try:
        _unused.append(_Block(mmap.PAGESIZE, device))
    except (HostMemoryError, OSError) as error:
        _log.info("weights stay on the GPU: %s", error)
        return False
    return True


def move_to_host(weights: Sequence[torch.Tensor]) -> int:
    """Move the values of ``weights``, in place, from their GPUs to the host, except where ``can_be_on_host`` is false;
    returns the bytes moved. Raises HostMemoryError if the host lacks memory; then some weights were moved.
    """
    fitting = {id(weight): weight for weight in weights if not is_on_host(weight) and can_be_on_host(weight)}
    left = [weight.data for weight in fitting.values()]
    try:
        with _lock:
            _make_blocks((weight.nbytes, weight.device) for weight in left)
        return sum(_move(weight, weight.device) for weight in fitting.values())
    finally:
        for device in {memory.device for memory in left}:
            _synchronize(device)  # other threads may have queued kernels on other streams that read it
        left.clear()
        if fitting:
            torch.cuda.empty_cache()


def load_on_host(weights: Sequence[torch.Tensor], device: torch.device) -> int:
    """As ``move_to_host``, for weights in the CPU's memory that ``device`` is to read."""
    reader = numbered(device)
    fitting = {id(weight): weight for weight in weights if weight.device.type == "cpu" and _is_worth_it(weight)}
    if not supports(reader):
        return 0
    moved, weights = 0, list(fitting.values())
    while weights:  # in parts: until a weight has moved, its memory is needed twice
        part = [weights.pop()]
        while weights and sum(weight.nbytes for weight in part) < _PART:
            part.append(weights.pop())
        with _lock:
            _make_blocks((weight.nbytes, reader) for weight in part if not was_on_host(weight))
        moved += sum(_move(weight, reader) for weight in part)
    return moved


def leave_on_host(weights: Sequence[torch.Tensor]) -> int:
    """Make CPU tensors of those ``weights`` that are on the host, in place, without copying them; ``load_on_host``
    undoes it. Returns their bytes."""
    hosted = {id(weight): weight for weight in weights if is_on_host(weight)}
    for device in {weight.device for weight in hosted.values()}:
        _synchronize(device)  # kernels that are queued may still write to them
    for weight in hosted.values():
        window = _window(weight)
        assert window is not None
        _point(weight, window.on_cpu)
    return sum(weight.nbytes for weight in hosted.values())


def _move(weight: torch.Tensor, device: torch.device) -> int:
    with _lock, torch.inference_mode(False), torch.no_grad():
        window = _window(weight)
        if window is None or window.device != device:
            window = _Window(_block(weight.nbytes, device), weight.nbytes)
            target = window.on_cpu() if weight.device.type == "cpu" else window.on_device()
            _like(weight, target).copy_(weight)
            _synchronize(device)
            _windows[window.address] = window
        _point(weight, window.on_device)
        return weight.nbytes


def _point(weight: torch.Tensor, memory: Callable[[], torch.Tensor]) -> None:
    # An inference tensor with ordinary memory would have no version and not know it.
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.data = _like(weight, memory())


def _window(weight: torch.Tensor) -> _Window | None:
    """The memory of a weight that is or was on the host, if the weight is all that is in it."""
    if not _windows or type(weight) not in _PLAIN:
        return None
    try:
        found = _windows.get(weight.untyped_storage().data_ptr())
    except (NotImplementedError, RuntimeError):  # such as a sparse tensor
        return None
    return found if found is None or found.size == weight.nbytes else None


def move_to_device(weights: Sequence[torch.Tensor]) -> int:
    """Move the values of those ``weights`` that are on the host back to their GPU; returns the bytes moved."""
    hosted = {id(weight): weight for weight in weights if is_on_host(weight)}
    for weight in hosted.values():
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            weight.data = on_device(weight)
    return sum(weight.nbytes for weight in hosted.values())


def on_device(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` itself, or a copy in the GPU's memory if it is on the host."""
    return weight.detach().clone() if is_on_host(weight) else weight


def host_bytes(weights: Sequence[torch.Tensor]) -> int:
    """The bytes of those ``weights`` that are on the host, each counted once."""
    return sum({weight.data_ptr(): weight.nbytes for weight in weights if is_on_host(weight)}.values())


def _like(weight: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return memory.view(weight.dtype).as_strided(weight.shape, weight.stride())


def _make_blocks(wanted: Iterable[tuple[int, torch.device]]) -> None:
    """Have an unused block of each size for each device, if there is room for all. Several threads make them: to fault
    the pages in takes most of the time."""
    unused, missing = list(_unused), []
    for size, device in sorted(wanted, key=lambda block: block[0]):
        found = _fitting(unused, size, device)
        if found is None:
            missing.append((size, device))
        else:
            unused.remove(found)
    if not missing:
        return
    for block in unused:
        _unused.remove(block)
        block.free()
    with contextlib.suppress(HostMemoryError):  # ``_block`` raises it for the first that is too much
        _check_room(sum(size for size, _ in missing))
        with ThreadPoolExecutor(_THREADS) as pool:
            # Each is in the list even if another one fails.
            list(pool.map(lambda block: _unused.append(_Block(*block)), missing))


def _block(size: int, device: torch.device) -> _Block:
    """A block for a weight of ``size`` bytes: an unused one that is not much larger, or a new one."""
    found = _fitting(_unused, size, device)
    if found is not None:
        _synchronize(device)  # kernels that are queued may still read what was in it
        _unused.remove(found)
        return found
    free_unused()
    _check_room(size)
    return _Block(size, device)


def _fitting(blocks: Iterable[_Block], size: int, device: torch.device) -> _Block | None:
    """The smallest of ``blocks`` for a weight of ``size`` bytes that is not much larger."""
    fitting = [block for block in blocks if block.device == device and size <= block.size <= 1.25 * size]
    return min(fitting, key=lambda block: block.size, default=None)


def _check_room(size: int) -> None:
    """Raise HostMemoryError if the host has too little memory for ``size`` bytes more."""
    free, whole = free_memory()
    if size > free - _RESERVE * whole:
        raise HostMemoryError(
            f"of {whole / 1e9:.1f} GB of host memory {free / 1e9:.1f} GB are free, "
            f"and {_RESERVE:.0%} are left to others"
        )


def free_unused() -> None:
    """Free the host memory of weights that no longer exist. Not done when they are deleted: it would invalidate the
    capture of a CUDA graph."""
    with _lock:
        while _unused:
            _unused.pop().free()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Block:
    """Page-locked host memory that a GPU can read, for one weight at a time.

    Attributes:
        size: in bytes.
        device: the GPU; a CPU, in tests, reads it as well.
        bytes: the memory as a CPU tensor.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = device
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._process = os.getpid()
        if device.type == "cuda":
            self.bytes[:: mmap.PAGESIZE].zero_()  # faults the pages in outside of the driver's locks
            self._register()

    def _register(self) -> None:
        with torch.cuda.device(self.device):
            code = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), self.size, _MAPPED))
            if not code:
                return
            with contextlib.suppress(RuntimeError):  # the next operation reports the error once more
                torch.zeros(1, dtype=torch.uint8, device=self.device).add_(1)
        raise HostMemoryError(f"{self.size / 1e9:.2f} GB of host memory cannot be page-locked: CUDA error {code}")

    def leave(self) -> None:
        """Its weight is gone."""
        if self._process == os.getpid():
            _unused.append(self)

    def free(self) -> None:
        """Free its memory; a forked process, which shares it, does not."""
        if self.device.type == "cuda" and self._process == os.getpid():
            torch.cuda.synchronize(self.device)
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())


class _Window:
    """A block's memory for as long as any tensor of its weight uses it.

    Attributes:
        size: of the weight in bytes.
        device: the GPU that reads it.
        address: both of the CPU and of the GPU.
    """

    def __init__(self, block: _Block, size: int) -> None:
        self.size = size
        self.device = block.device
        self._block = block
        self.address = block.bytes.data_ptr()
        # https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (self.address, False), "version": 3}
        if block.device.type == "cuda":
            self.__cuda_array_interface__ = self.__array_interface__
        weakref.finalize(self, block.leave).atexit = False

    def on_device(self) -> torch.Tensor:
        """Its bytes as the GPU reads them."""
        if self._block.device.type == "cpu":
            return self.on_cpu()
        return torch.as_tensor(self, dtype=torch.uint8, device=self._block.device)

    def on_cpu(self) -> torch.Tensor:
        """Its bytes as a tensor of the CPU."""
        return torch.from_numpy(numpy.asarray(self))
