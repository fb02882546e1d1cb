"""Whether a weight has changed since its 8-bit copy was made.

A weight can change under a compiled graph in many ways, none of which Dynamo guards against:

==============================================  ===========  ==========  =========
change                                          same object  _version    data_ptr
==============================================  ===========  ==========  =========
``w.add_``, ``copy_``, ``load_state_dict``      yes          moves       same
``w.data = new``                                yes          same        moves
a new Parameter (ComfyUI's LoRA)                no
``w.data += d``, ``w.data.copy_`` (PEFT)        yes          same        same
==============================================  ===========  ==========  =========

The last one can only be seen in the values: a few of each weight are compared at every call.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..tensors import sample
from .freed_weights import sentinel_values

if TYPE_CHECKING:
    from ..kernels.nvidia import snapshot

# Values compared of each weight at every call. Merging a LoRA moves nearly every value of many weights at once.
_SAMPLES = 2
_pointer_of = torch.Tensor.data_ptr
_version_of: Callable[[torch.Tensor], int] = torch.Tensor._version.__get__  # type: ignore[attr-defined]


class Snapshot:
    """How several weights were at one time; tells cheaply whether any has changed.

    ``freed``: of each weight, whether it is hollow. It has no references to the weights, but views of their memory.
    """

    def __init__(self, weights: Sequence[torch.Tensor], freed: Sequence[bool]) -> None:
        self._counted = [not weight.is_inference() for weight in weights]  # inference tensors count no versions
        self._versions = self._versions_of(weights)
        self._pointers = list(map(_pointer_of, weights))
        alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for weight, is_freed in zip(weights, freed, strict=True):
            view = sentinel_values(weight) if is_freed else _sample_view(weight)
            alike.setdefault((weight.dtype, weight.device), []).append(view)
        with torch.inference_mode(False):
            self._samples = [_Samples(views) for (_, device), views in alike.items() if device.type != "cuda"]
            self._gpu_samples = [_gpu_samples(views) for (_, device), views in alike.items() if device.type == "cuda"]

    def is_current(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether these weights, identical to the snapshot's, are as they were.

        Values on a GPU are not looked at: see ``begin_check``. Runs at every call, so it is quick.
        """
        if self._versions_of(weights) != self._versions:
            return False
        if list(map(_pointer_of, weights)) != self._pointers:
            return False
        return not any(samples.have_changed() for samples in self._samples)

    def begin_check(self) -> bool:
        """Have GPUs compare sampled values with the snapshot, in front of what they are given next.

        Returns whether there is an answer to be waited for; none while the caller captures a CUDA graph.
        """
        if not self._gpu_samples or torch.cuda.is_current_stream_capturing():
            return False
        for samples in self._gpu_samples:
            samples.begin()
        return True

    def end_check(self) -> bool:
        """Wait for what ``begin_check`` began: whether no value had changed."""
        return not any(samples.end() for samples in self._gpu_samples)

    def _versions_of(self, weights: Sequence[torch.Tensor]) -> list[int]:
        return list(map(_version_of, itertools.compress(weights, self._counted)))


def addresses_and_versions(weights: Sequence[torch.Tensor]) -> list[tuple[int, int]] | None:
    """What changes with most changes of ``weights``, and costs no look at their values; None where some have no single
    address, as quantized ones."""
    if any(type(weight) not in (torch.Tensor, torch.nn.Parameter) for weight in weights):
        return None
    return [(weight.data_ptr(), -1 if weight.is_inference() else weight._version) for weight in weights]


@dataclasses.dataclass
class Stamp:
    """What tells one state of a weight from another: finer than a snapshot, for use off the fast path."""

    pointer: int
    version: int | None
    values: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Stamp:
        version = None if weight.is_inference() else weight._version
        # Bits, for NaN is not equal to NaN. Not left on a GPU, see ``weight_copy.make_room``.
        values = sample(weight, 4096).to("cpu", copy=True).view(torch.uint8)
        return cls(weight.data_ptr(), version, values)

    def matches(self, other: Stamp) -> bool:
        same_memory = (self.pointer, self.version) == (other.pointer, other.version)
        return same_memory and torch.equal(self.values, other.values)


def _sample_view(weight: torch.Tensor) -> torch.Tensor:
    """A few of a weight's values, of its middle column (or tap): that is a view whatever gaps its memory has."""
    for size in weight.shape[1:]:
        weight = weight.select(1, size // 2)
    return sample(weight, _SAMPLES)


class _Samples:
    """A snapshot of ``views`` of one dtype; see ``kernels.snapshot``."""

    def __init__(self, views: list[torch.Tensor]) -> None:
        self._views = views
        self._bits = torch.cat(views).view(torch.uint8)  # NaN is not equal to NaN, its bits are

    def have_changed(self) -> bool:
        return not torch.equal(torch.cat(self._views).view(torch.uint8), self._bits)


def _gpu_samples(views: list[torch.Tensor]) -> snapshot.Samples:
    from ..kernels.nvidia import snapshot  # needs Triton

    return snapshot.Samples(views)
