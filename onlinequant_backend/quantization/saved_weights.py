"""8-bit weights that an earlier process has saved, instead of those that quantizing would make.

A saved weight is used only for the float weight that it was made of: a checksum of all of its bytes decides, since a
LoRA may change a few values only. What was read is checked the same way, since a file may be damaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..cache.weights_file import SavedWeight, WeightsFile
from ..kernels.formats import Format
from .checksum import can_be_summed, checksum
from .weight_changes import Stamp
from .weight_quantization import quantize_weight

_DTYPES = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}
_UNKNOWN = "0" * 16


class Source(NamedTuple):
    """A float weight, and how it is quantized.

    Attributes:
        name: of its layer.
        weight: the float weight.
        format: of its 8-bit copy.
        smoothing: see ``quantize_weight``.
    """

    name: str
    weight: torch.Tensor
    format: Format
    smoothing: torch.Tensor | None

    def can_be_saved(self) -> bool:
        """Whether it is a plain float tensor without gaps in its memory, in a format that files have."""
        is_float = self.weight.is_floating_point() and self.weight.itemsize > 1
        return is_float and self.format.weight in _DTYPES and can_be_summed(self.weight)

    def outline(self) -> SavedWeight:
        """What a file says of it, but for the checksums."""
        scales = torch.Size(self.format.scale_shape(self.weight.shape)).numel()
        return SavedWeight(self.name, _DTYPES[self.format.weight], tuple(self.weight.shape), scales, _UNKNOWN, _UNKNOWN)

    def digest(self, total: int) -> str:
        """16 hex digits for all that the 8-bit weight depends on; ``total``: ``checksum`` of the float weight."""
        text = f"{self.weight.dtype} {self.weight.stride()} {self.format.name} {total}"
        factors = b"" if self.smoothing is None else self.smoothing.cpu().numpy().tobytes()
        return hashlib.sha256(text.encode() + factors).hexdigest()[:16]


class SavedCopy:
    """A saved 8-bit weight of a float weight. ``damaged`` is called if it turns out to be damaged.

    Attributes:
        stamp: of the float weight before it was compared with the one that this was made of.
    """

    def __init__(self, file: WeightsFile, source: Source, stamp: Stamp, damaged: Callable[[], object]) -> None:
        self.stamp = stamp
        self._file = file
        self._source = source
        self._damaged = damaged

    def read(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Values and scales as ``quantize_weight`` returns them, on the weight's device; None if they are damaged."""
        name, weight, format, _ = self._source
        values, scales = (
            torch.frombuffer(part, dtype=torch.uint8).to(weight.device)
            for part in (self._file.values[name], bytearray(self._file.scales[name]))
        )
        q, scale = values.view(format.weight).view(weight.shape), scales.view(torch.float32)
        if _digest_of(q, scale) != self._file.weights[name].checksum:
            self._damaged()
            return None
        return q, scale.view(format.scale_shape(weight.shape))


def matching(
    file: WeightsFile, sources: Sequence[Source | None], damaged: Callable[[], object] = lambda: None
) -> dict[int, SavedCopy]:
    """The saved weights of those ``sources`` that they were made of, by position; None is passed over."""
    stamps: dict[int, Stamp] = {}
    sums: dict[torch.device, dict[int, torch.Tensor]] = {}
    for position, source in enumerate(sources):
        if source is not None and source.can_be_saved() and _is_like(source, file):
            stamps[position] = Stamp.of(source.weight)  # before reading the weight, which a thread may change meanwhile
            sums.setdefault(source.weight.device, {})[position] = checksum(source.weight)
    found = {}
    for of_device in sums.values():
        totals = torch.stack(list(of_device.values())).tolist()  # one wait for all
        for position, total in zip(of_device, totals, strict=True):
            source = sources[position]
            assert source is not None
            if source.digest(total) == file.weights[source.name].source:
                found[position] = SavedCopy(file, source, stamps[position], damaged)
    return found


def made(sources: Sequence[Source]) -> Iterator[tuple[SavedWeight, memoryview, bytes]]:
    """Quantize ``sources``, each of which ``can_be_saved``, one after the other, for ``weights_file.write``. Copies in
    use may be packed, or be parts of a merged weight. Raises RuntimeError if a weight changes meanwhile."""
    for source in sources:
        total = int(checksum(source.weight))
        q, scale = quantize_weight(source.weight, source.format, smoothing=source.smoothing)
        if int(checksum(source.weight)) != total:
            raise RuntimeError(f"the weight of {source.name} changes")
        outline = source.outline()
        weight = SavedWeight(
            outline.name,
            outline.dtype,
            outline.shape,
            outline.scales,
            source.digest(total),
            _digest_of(q, scale),
        )
        yield weight, _bytes(q), bytes(_bytes(scale))


def _is_like(source: Source, file: WeightsFile) -> bool:
    known = file.weights.get(source.name)
    like = source.outline()
    return known is not None and (known.dtype, known.shape, known.scales) == (like.dtype, like.shape, like.scales)


def _digest_of(q: torch.Tensor, scale: torch.Tensor) -> str:
    text = f"{int(checksum(q))} {int(checksum(scale))}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().cpu().view(torch.uint8).flatten().numpy().data
