"""User functions for compiled models: quantize weights again, release memory, reset."""

from __future__ import annotations

import weakref

import torch

from ..quantization import host_weights
from ..quantization.layer_registry import known_layers
from ..quantization.weight_copy import Generation
from ..report.report import clear
from .quantized_graph import graphs
from .set_registry import known_sets


def invalidate(module: torch.nn.Module) -> int:
    """Forget the 8-bit copies of ``module``'s weights: the next call quantizes them again.

    Only needed after a change that version counters do not show and samples may miss: a few values of a weight, written
    through ``.data``. Returns how many 8-bit copies were forgotten.
    """
    return known_layers.forget_weights(list(module.parameters()))


def release(module: torch.nn.Module) -> int:
    """Free the memory of the 8-bit copies of ``module``'s weights and of the CUDA graphs that use them. The next call
    makes them again from its float weights, without compiling. Returns the size of the copies in bytes. Copies whose
    float weights were freed (``free_float_weights``) stay.
    """
    return known_sets.release(list(module.parameters()))


def host_bytes(module: torch.nn.Module) -> int:
    """The size in bytes of those weights of ``module`` on a GPU that are in host memory."""
    return host_weights.host_bytes(list(module.parameters())) if host_weights.are_any_on_host() else 0


def copied_bytes(module: torch.nn.Module) -> int:
    """The size in bytes of the 8-bit copies that ``module`` uses; 0 while there are none."""
    when, size = _copied_bytes.get(module, (-1, 0))
    if when != Generation.copies:  # ComfyUI asks several times per run, and listing the parameters takes milliseconds
        when, size = _copied_bytes[module] = Generation.copies, known_sets.copied_bytes(list(module.parameters()))
    return size


_copied_bytes: weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, int]] = weakref.WeakKeyDictionary()


def reset() -> None:
    """Forget everything in this process: observed ranges, 8-bit weights and reports.

    Models that are compiled already keep their graphs; ``torch._dynamo.reset()`` has them compiled anew.
    """
    known_layers.clear()
    known_sets.clear()
    _copied_bytes.clear()
    graphs.clear()
    clear()
    host_weights.free_unused()
