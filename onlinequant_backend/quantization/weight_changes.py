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

The last one shows only in the values: a sample of each weight is compared at every call.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..tensors import plain_tensors, sample
from .freed_weights import sentinel_values

if TYPE_CHECKING:
    from ..kernels.nvidia import snapshot

# The number of values compared per weight and call. Merging a LoRA changes nearly every value of many weights.
_SAMPLES = 2
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_pointer_of = torch.Tensor.data_ptr
_version_of: Callable[[torch.Tensor], int] = torch.Tensor._version.__get__  # type: ignore[attr-defined]


class Snapshot:
    """A snapshot of several weights that shows at low cost whether any has changed. ``freed``: for each weight, whether
    it is hollow. The snapshot has no references to the weights, only views of their memory.
    """

    def __init__(self, weights: Sequence[torch.Tensor], freed: Sequence[bool]) -> None:
        self._are_plain = all(type(weight) in _PLAIN for weight in weights)
        freed = [is_freed for weight, is_freed in zip(weights, freed, strict=True) for _ in plain_tensors(weight)]
        weights = self._parts(weights)
        self._counted = [not weight.is_inference() for weight in weights]  # inference tensors have no version counter
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
        """Whether these weights, the same objects as in the snapshot, are unchanged. Does not check values on a GPU:
        see ``begin_check``. Runs at every call, so it is fast.
        """
        weights = self._parts(weights)
        if self._versions_of(weights) != self._versions:
            return False
        if list(map(_pointer_of, weights)) != self._pointers:
            return False
        return not any(samples.have_changed() for samples in self._samples)

    def begin_check(self) -> bool:
        """Queue a comparison of sampled values with the snapshot on the GPUs. Returns whether a result is pending;
        there is none while the caller captures a CUDA graph.
        """
        if not self._gpu_samples or torch.cuda.is_current_stream_capturing():
            return False
        for samples in self._gpu_samples:
            samples.begin()
        return True

    def end_check(self) -> bool:
        """Wait for the comparison that ``begin_check`` queued; returns whether no value has changed."""
        return not any(samples.end() for samples in self._gpu_samples)

    def _parts(self, weights: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return weights if self._are_plain else [part for weight in weights for part in plain_tensors(weight)]

    def _versions_of(self, weights: Sequence[torch.Tensor]) -> list[int]:
        return list(map(_version_of, itertools.compress(weights, self._counted)))


def addresses_and_versions(weights: Sequence[torch.Tensor]) -> list[tuple[int, int]] | None:
    """Addresses and versions, which show most changes of ``weights`` without reading their values; None if some weight,
    such as a quantized one, has no single address."""
    if any(type(weight) not in _PLAIN for weight in weights):
        return None
    return [(weight.data_ptr(), -1 if weight.is_inference() else weight._version) for weight in weights]


@dataclasses.dataclass
class Stamp:
    """Identifies one state of a weight, with more samples than a snapshot; not for the fast path.

    Attributes:
        pointers, versions: of the plain tensors that it consists of.
        values: bits sampled from all of them.
    """

    pointers: list[int]
    versions: list[int | None]
    values: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Stamp:
        parts = plain_tensors(weight)
        versions = [None if part.is_inference() else part._version for part in parts]
        # As bits, since NaN is not equal to NaN. Not kept on a GPU, see ``weight_copy.make_room``.
        values = [sample(part, 4096).to("cpu", copy=True).view(torch.uint8) for part in parts]
        return cls([part.data_ptr() for part in parts], versions, torch.cat(values))

    def matches(self, other: Stamp) -> bool:
        same_memory = (self.pointers, self.versions) == (other.pointers, other.versions)
        return same_memory and torch.equal(self.values, other.values)


def _sample_view(weight: torch.Tensor) -> torch.Tensor:
    """A sample of a weight's values, from its middle column (or tap): a view even if the memory has gaps."""
    for size in weight.shape[1:]:
        weight = weight.select(1, size // 2)
    return sample(weight, _SAMPLES)


class _Samples:
    """A snapshot of ``views`` of one dtype; see ``kernels.snapshot``."""

    def __init__(self, views: list[torch.Tensor]) -> None:
        self._views = views
        self._bits = torch.cat(views).view(torch.uint8)  # as bits, since NaN is not equal to NaN

    def have_changed(self) -> bool:
        return not torch.equal(torch.cat(self._views).view(torch.uint8), self._bits)


def _gpu_samples(views: list[torch.Tensor]) -> snapshot.Samples:
    from ..kernels.nvidia import snapshot  # needs Triton

    return snapshot.Samples(views)
