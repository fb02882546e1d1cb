"""The 8-bit copies of weights, and which of them are being read. Threads may run models that share weights, so code
that writes data which calls read follows two rules: it holds ``copies_lock``, and it increments ``Generation.number``
before it checks which data other threads read. A call registers what it reads before it compares the number. So either
the writer sees the call, or the call waits for the writer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from .. import fork_locks
from ..errors import FreedWeightsError
from ..kernels.formats import Format
from ..kernels.provider import provider_of
from .weight_changes import Stamp
from .weight_identity import weak_reference
from .weight_quantization import quantize_weight, scale_of

if TYPE_CHECKING:
    from ..graph.conv_geometry import ConvGeometry
    from .layer_state import Layer
    from .merged_weight import MergedWeight
    from .saved_weights import SavedCopy


# Held while 8-bit copies and ranges are written, passed to a compiled graph or released. A call in another thread keeps
# those that were passed to it for as long as it runs.
copies_lock = fork_locks.rlock()
_running: list[Call] = []


class Generation:
    """Counts how often data that calls read was written or marked as stale; incremented with ``copies_lock`` held.

    Attributes:
        copies: how often a copy was created or released, or a model began to use copies.
    """

    number = 0
    copies = 0


class Call:
    """Within the block, this thread runs a call.

    Attributes:
        layers: whose 8-bit copies and ranges it reads.
    """

    __slots__ = ("layers", "thread")

    def __enter__(self) -> Call:
        self.layers: Sequence[Layer] = ()
        self.thread = threading.get_ident()
        _running.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _running.remove(self)


def read_elsewhere() -> Iterator[Layer]:
    """The layers that calls in other threads read."""
    this_thread = threading.get_ident()
    return (layer for call in list(_running) if call.thread != this_thread for layer in call.layers)


def _forget_others() -> None:
    this_thread = threading.get_ident()
    _running[:] = [call for call in _running if call.thread == this_thread]


fork_locks.in_child(_forget_others)  # the child has no other threads


class Copy:
    """The 8-bit copy of a weight. Another weight that replaces it in the model may take the copy over.

    Attributes:
        geometry, format: what the copy depends on besides the weight.
        weight, weight_scale: the copy, or None.
        merged: the merged weight that it is a part of, or None.
        in_use: whether a graph uses it.
        room: memory allocated for the next copy and its scales.
        freed: whether the float weight was freed, so that the copy cannot be made again.
        read_in_float: whether some graph reads the float weight, which then stays on the GPU.
    """

    def __init__(self, geometry: ConvGeometry | None, format: Format) -> None:
        self.geometry = geometry
        self.format = format
        self.weight: torch.Tensor | None = None
        self.weight_scale: torch.Tensor | None = None
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None
        self.merged: MergedWeight | None = None
        self.in_use = False
        self.freed = self.read_in_float = False
        self._source: Callable[[], torch.Tensor | None] = lambda: None
        self._former: list[Callable[[], torch.Tensor | None]] = []
        self._stamp: Stamp | None = None

    @property
    def source(self) -> torch.Tensor | None:
        """The weight that this is a copy of; None if there is none, or if it no longer exists."""
        return self._source()

    def is_current(self, weight: torch.Tensor) -> bool:
        """Whether this is a copy of the current values of ``weight``."""
        if self.weight is None or self.source is not weight or self._stamp is None:
            return False
        return self._stamp.matches(Stamp.of(weight))

    def is_claimed(self, weight: torch.Tensor) -> bool:
        """Whether a weight other than ``weight`` still needs this copy, so that it cannot be taken over. That is so if
        its model runs in another thread, or has taken this copy from ``weight`` itself. Otherwise the other weight is
        most likely set aside while ``weight`` is in its place, as in ComfyUI.
        """
        if self.source is None or self.source is weight:
            return False
        with copies_lock:
            Generation.number += 1
            return self.freed or any(former() is weight for former in self._former) or self._is_read_elsewhere()

    def _is_read_elsewhere(self) -> bool:
        sharing = self._sharing()
        return any(layer.copy in sharing for layer in read_elsewhere())

    def _sharing(self) -> Sequence[Copy]:
        return (self,) if self.merged is None else self.merged.copies

    def requantize(
        self, weight: torch.Tensor, smoothing: torch.Tensor | None = None, saved: SavedCopy | None = None
    ) -> None:
        """Quantize ``weight`` into the same 8-bit tensors as before, so that compiled graphs need not change; into
        new ones while a call in another thread reads these. ``smoothing``: see ``quantize_weight``. ``saved``: what an
        earlier process has made of the same values, and is read instead if possible."""
        self.check_not_freed()
        # Of before reading the weight, which another thread may change meanwhile.
        stamp = Stamp.of(weight) if saved is None else saved.stamp
        with copies_lock, torch.inference_mode(False), torch.no_grad():
            self.forget()  # before writing, since an interrupt may leave it half written
            if self._is_read_elsewhere():
                self._renew()
            self._remember(weight)
            shared = None
            if self.merged is not None and self.merged.shares_scale:
                shared = self.merged.lay(self, float(scale_of(weight, self.format)))
            if self.weight is None or self.weight_scale is None:
                self.weight, self.weight_scale = self._taken_room(weight)
                Generation.copies += 1
            scale = self._write(self.weight, weight, shared, smoothing, saved if shared is None else None)
            if shared is None:
                self.weight_scale.copy_(scale)
            self._stamp = stamp

    def _remember(self, weight: torch.Tensor) -> None:
        """Record the source weight and the former ones."""
        if self.source is not weight:
            known = [former for former in (*self._former, self._source) if former() is not None]
            self._former = list({id(former()): former for former in known if former() is not weight}.values())
            self._source = weak_reference(weight)

    def _renew(self) -> None:
        if self.merged is not None:
            self.merged.renew()
        else:
            self.weight = self.weight_scale = None

    def needs_room(self) -> bool:
        """Whether there is neither a copy nor memory for one."""
        return self.weight is None and self.room is None and not self.format.is_packed

    def _taken_room(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        room, self.room = self.room, None
        if room is None or room[0].shape != weight.shape or room[0].device != weight.device:
            return self.new_tensor(weight), self.new_scale(weight)
        return room

    def new_scale(self, weight: torch.Tensor) -> torch.Tensor:
        """Memory for the scales of a copy of ``weight``."""
        return torch.empty(self.format.scale_shape(weight.shape), dtype=torch.float32, device=weight.device)

    def new_tensor(self, weight: torch.Tensor) -> torch.Tensor:
        """Memory for a copy of ``weight``."""
        return provider_of(self.format, weight.device).new_weight(weight.shape, self.format, weight.device)

    def _write(
        self,
        tensor: torch.Tensor,
        weight: torch.Tensor,
        scale: float | None,
        smoothing: torch.Tensor | None,
        saved: SavedCopy | None,
    ) -> torch.Tensor:
        """Quantize ``weight`` into ``tensor``, or read what was saved; see ``quantize_weight``, whose scales this
        returns."""
        found = None if saved is None else saved.read()
        if found is None and not self.format.is_packed:
            return quantize_weight(weight, self.format, scale, smoothing, tensor)[1]
        q, scales = found or quantize_weight(weight, self.format, scale, smoothing)
        if self.format.is_packed:
            provider_of(self.format, weight.device).pack(tensor, q, self.geometry)
        else:
            tensor.copy_(q)
        return scales

    def forget(self) -> Stamp | None:
        """Mark the copy as stale; returns the stamp of its source."""
        with copies_lock:
            stamp, self._stamp = self._stamp, None
            Generation.number += 1
            return stamp

    def recall(self, stamp: Stamp | None) -> None:
        """Undo ``forget``, with the stamp that it returned: the copy still belongs to that state of the weight."""
        self._stamp = stamp

    def restamp(self, weight: torch.Tensor) -> None:
        """Record the current state of ``weight`` as the one that this was made of."""
        self._source = weak_reference(weight)
        self._stamp = Stamp.of(weight)

    def check_not_freed(self) -> None:
        """Raise FreedWeightsError if the float weight for this copy was freed."""
        if self.freed:
            raise FreedWeightsError(
                "A weight was changed or needed after its float values were freed (free_float_weights=True). "
                "Load the model again; to change weights, as a LoRA does, compile with free_float_weights=False."
            )

    def drop(self) -> None:
        """Free the copy, unless a graph uses it."""
        if not self.in_use:
            self.weight = self.weight_scale = None
            Generation.copies += 1

    def release(self) -> int:
        """Free the copy although graphs use it; returns its bytes. Frees copies that share its memory as well."""
        sharing = self._sharing()
        if any(copy.freed for copy in sharing):  # it could not be made again
            return 0
        freed = sum(copy.nbytes() for copy in sharing)
        for copy in sharing:
            copy.weight = copy.weight_scale = copy.merged = None
            copy.forget()
        Generation.copies += 1
        return freed

    def nbytes(self) -> int:
        """The memory of the copy in bytes."""
        return 0 if self.weight is None else self.weight.nbytes


def make_room(copies: Sequence[Copy], weights: Sequence[torch.Tensor]) -> None:
    """Allocate the memory that ``requantize`` needs to make ``copies`` of ``weights``, for those that do not exist yet.
    Allocating all copies first keeps temporary tensors of the quantization from leaving gaps between them: a GPU's
    memory is freed in large segments, and only if no tensor, not even a scale, is in them. Copies of several linear
    layers will most likely be merged, so they are allocated one after the other, as ``MergedWeight`` needs them.
    """
    new = [(copy, weight) for copy, weight in zip(copies, weights, strict=True) if copy.needs_room()]
    with torch.inference_mode(False):
        if len(new) > 1 and len({copy for copy, _ in new}) == len(copies) and _can_be_one(weights):
            rows = [len(weight) for weight in weights]
            whole = torch.empty(sum(rows), weights[0].shape[1], dtype=copies[0].format.weight, device=weights[0].device)
            for copy, part, weight in zip(copies, whole.split(rows), weights, strict=True):
                copy.room = part, copy.new_scale(weight)
            return
        for copy, weight in new:
            if copy.needs_room():
                copy.room = copy.new_tensor(weight), copy.new_scale(weight)


def _can_be_one(weights: Sequence[torch.Tensor]) -> bool:
    # Each part may also be read alone, by kernels that require addresses that are multiples of 16.
    alike = len({(weight.dim(), weight.shape[1:], weight.device) for weight in weights}) == 1
    return alike and weights[0].dim() == 2 and all(weight.numel() % 16 == 0 for weight in weights)
