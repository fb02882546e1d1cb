"""8-bit copies of a model's weights, and whether the float weights have changed since.

A ``Layer`` is the state of one place at which a weight is used in this process. Layers live in a registry keyed by the
weight's identity and the number of the place, because one model reaches the backend as several graphs (another shape,
``no_grad`` then ``inference_mode``), and all of them must share one calibration.

A ``WeightSet`` holds the layers of one call of one graph. ``weight_changes`` detects that a weight has changed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Protocol

import torch

from ..tensors import getter
from .float_weights import FloatWeights
from .freed_weights import free_values
from .host_weights import is_plain
from .layer_registry import known_layers
from .layer_state import Layer
from .merged_weight import MergedWeight, merged_weight
from .saved_weights import SavedCopy
from .weight_changes import Snapshot
from .weight_copy import Copy, Generation, copies_lock, make_room
from .weight_identity import weak_key


class Releasable(Protocol):
    """The state that a compiled graph has prepared for a set of weights."""

    def release(self) -> None:
        """Free the memory of CUDA graphs."""


def places(weights: Iterable[int]) -> list[int]:
    """For each layer, the number of earlier ones with the same weight; ``weights``: identities of the layers'
    weights."""
    seen: Counter[int] = Counter()
    numbers = []
    for weight in weights:
        numbers.append(seen[weight])
        seen[weight] += 1
    return numbers


class WeightSet(FloatWeights):
    """The weights of one call, their layers, and a snapshot that shows at low cost whether any has changed.
    ``together``: for each expected merged weight, the indices of its layers.

    Attributes:
        layout: identifies the strides and dtypes of all parameters.
        kind: identifies the layout, the selection and the smoothing: all properties that a graph is compiled for.
        prepared: for each compiled graph, its state for calls with these weights.
        generation: the generation of the copies and ranges with which this set was last brought up to date.
        changed: the copies that ``follow`` quantized again.
        unread: positions of the parameters that the graph no longer reads, since it was rewritten.
        ids: the parameters' identities. A set must not keep a dropped model alive, so it has no references; ``alive``
            becomes False when the first parameter is deleted, since its identity may then be reused.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        names: Sequence[str],
        candidates: Sequence[int],
        layers: Sequence[Layer],
        layout: int = 0,
        together: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__(layers, candidates)
        self.layout = self.kind = layout
        self.prepared: dict[object, Releasable] = {}
        self.generation = -1
        self.changed: set[Copy] = set()
        self.unread: frozenset[int] = frozenset()
        self.ids = tuple(map(id, parameters))
        self.alive = True
        self._together = together
        self._guards = {
            name: weakref.ref(weak_key(parameter), self._expire)
            for name, parameter in zip(names, parameters, strict=True)
        }
        self._left = len(self._guards)
        self._snapshot: Snapshot | None = None
        self._watched: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]] | None = None
        self._places = places(self.ids[candidate] for candidate in candidates)
        keys = zip((names[candidate] for candidate in candidates), places(candidates), strict=True)
        self._index = {key: index for index, key in enumerate(keys)}

    def _expire(self, _guard: object) -> None:
        self.alive = False
        self._left -= 1
        if not self._left and self._snapshot is not None:
            # The set cannot be called again, and the graph may not be called with another model. The snapshot has views
            # of the weights' memory.
            self.prepared.clear()
            self.layers, self._snapshot, self._watched = (), None, None

    def overlap(self, parameters: Mapping[str, torch.Tensor]) -> int:
        """The number of these parameters, by qualified name, that are in this set under the same name."""
        return sum(
            name in self._guards and self._guards[name]() is weak_key(weight) for name, weight in parameters.items()
        )

    def has_any_of(self, ids: Set[int]) -> bool:
        """Whether any parameter with one of these identities is in this set."""
        known = (guard() for guard in self._guards.values())
        return any(id(parameter()) in ids for parameter in known if parameter is not None)

    def layer(self, name: str, place: int = 0) -> Layer | None:
        """The layer whose weight has this name, at the place with this number, from 0."""
        index = self._index.get((name, place))
        return None if index is None else self.layers[index]

    def forget_calls(self) -> None:
        """Forget what was prepared for calls, so that its memory is free."""
        self.prepared.clear()

    def is_dead(self) -> bool:
        """Whether no parameter is left."""
        return all(guard() is None for guard in self._guards.values())

    def rest(self, parameters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A call's parameters that are read and are not weights of layers, such as biases and norms, by name."""
        weights = self.unread.union(self._candidates)
        named = zip(self._guards, parameters, strict=True)
        return {name: parameter for i, (name, parameter) in enumerate(named) if i not in weights}

    def start_over(self) -> None:
        """Calibrate anew: another checkpoint was loaded into these parameters, or the user requested it."""
        for layer in self.layers:
            layer.start_over()
        self.selection = None

    def was_called_once(self) -> bool:
        """Whether it was observed for at most one call and was never quantized."""
        return self.selection is None and bool(self.layers) and all(layer.calls <= 1 for layer in self.layers)

    def quantize(
        self,
        parameters: Sequence[torch.Tensor],
        indices: Sequence[int],
        saved: Mapping[int, SavedCopy] = MappingProxyType({}),
    ) -> int:
        """Bring the 8-bit copies of the layers at ``indices`` up to date; returns how many were stale. ``saved``: by
        index, what an earlier process has saved of these."""
        stale: set[Copy] = set()
        with copies_lock, self.room(parameters, indices):
            # Twice: a merged weight whose scale has shrunk marks the other layers' parts as stale.
            for some in (indices, [index for index in indices if self.layers[index].copy.merged is not None]):
                for index in some:
                    weight = parameters[self._candidates[index]]
                    self._claim(index, weight)
                    layer = self.layers[index]
                    if not layer.is_current(weight):
                        self.changed.add(layer.copy)  # before quantizing, which may be interrupted
                        stale.add(layer.copy)
                        layer.requantize(weight, saved.get(index))
        return len(stale)

    @contextlib.contextmanager
    def room(self, parameters: Sequence[torch.Tensor], indices: Sequence[int]) -> Iterator[None]:
        """Within the block, memory is allocated for the missing copies of these layers; see ``make_room``."""
        for index in indices:
            self.layers[index].make_room()
        wanted = set(indices)
        grouped = {index for group in self._together for index in group}
        groups = [*self._together, *((index,) for index in indices if index not in grouped)]
        copies = [self.layers[index].copy for index in indices]
        try:
            for group in groups:
                members = [index for index in group if index in wanted]
                weights = [parameters[self._candidates[index]] for index in members]
                make_room([self.layers[index].copy for index in members], weights)
            yield
        finally:
            for copy in copies:
                copy.room = None

    def _claim(self, index: int, weight: torch.Tensor) -> None:
        """Ensure that ``weight`` may be quantized into the layer's copy."""
        self.layers[index].choose_copy()
        if self.layers[index].copy.source is weight:
            return
        layer = known_layers.known(self.layers[index], weight, self._places[index])
        if layer.copy.is_claimed(weight):
            layer = known_layers.part(layer, weight, self._places[index])
        if layer is not self.layers[index]:
            self._replace(index, layer)

    def _replace(self, index: int, layer: Layer) -> None:
        # Replaces the whole list: calls in other threads keep reading the layers that they began with.
        self.layers = (*self.layers[:index], layer, *self.layers[index + 1 :])

    def merge(self, indices: Sequence[int]) -> MergedWeight | None:
        """The merged weight of the linear layers at ``indices``; None if one of them is part of another one already."""
        return merged_weight([self.layers[index].copy for index in indices])

    def extra(self, what: str, of: int | tuple[int, ...]) -> torch.Tensor:
        """The extra input ``what`` of a compiled graph, as named by rewriting, for a layer or a merged weight."""
        for index in (of,) if isinstance(of, int) else of:
            self.layers[index].restore_copy()  # may have been released since the check whether it is current
        if isinstance(of, int):
            found = getattr(self.layers[of], what)
        else:
            merged = self.merge(of) or self._merge_apart(of)
            found = getattr(merged, what.removeprefix("merged_"))
        assert isinstance(found, torch.Tensor)
        return found

    def _merge_apart(self, indices: Sequence[int]) -> MergedWeight:
        """``merge`` with new copies: another model with some of these weights has merged those with other ones."""
        for index in indices:
            weight = self.layers[index].copy.source
            assert weight is not None
            self._replace(index, self.layers[index].parted())
            self.layers[index].requantize(weight)
            self.layers[index].copy.in_use = True
        merged = self.merge(indices)
        assert merged is not None
        return merged

    def select(self, parameters: Sequence[torch.Tensor], indices: Sequence[int]) -> None:
        """Select the layers at ``indices`` for 8-bit execution; frees the 8-bit copies of the others."""
        self._bring_up_to_date(parameters, indices)
        for index in indices:
            self.layers[index].copy.in_use = True
        unselected = set(range(len(self.layers))).difference(indices)
        for layer in self.layers:
            layer.copy.drop()
        for index in unselected:
            self.layers[index].copy.read_in_float = True
        self.move_to_device(parameters, unselected)
        self.changed.clear()
        self.selection = tuple(indices)  # last, since other threads may use it from now on
        Generation.copies += 1

    def free(self, parameters: Sequence[torch.Tensor]) -> int:
        """Free the float weights of the quantized layers; returns the freed bytes."""
        assert self.selection is not None
        in_float = {candidate for i, candidate in enumerate(self._candidates) if i not in self.selection}
        full = {
            self.layers[i].copy: parameters[self._candidates[i]]
            for i in self.selection
            if not self.layers[i].copy.freed and self._candidates[i] not in in_float
        }
        # Integers have no NaN to leave behind.
        full = {copy: weight for copy, weight in full.items() if is_plain(weight) and weight.is_floating_point()}
        freed = free_values(list({id(weight): weight for weight in full.values()}.values()))
        for copy, weight in full.items():
            copy.freed = True
            copy.restamp(weight)
        self._bring_up_to_date(parameters, self.selection)
        return freed

    def follow(self, parameters: Sequence[torch.Tensor]) -> int:
        """Quantize changed weights again, in place; returns the number of copies. Adds these to ``changed``, which the
        caller clears once it has handled them."""
        assert self.selection is not None
        return self._bring_up_to_date(parameters, self.selection)

    def _bring_up_to_date(self, parameters: Sequence[torch.Tensor], selection: Sequence[int]) -> int:
        watched = getter([self._candidates[index] for index in selection])
        with copies_lock:
            self.move_to_host(parameters, selection)
            # Taken before quantizing, so that the next call detects changes by other threads meanwhile.
            snapshot = Snapshot(watched(parameters), [self.layers[index].copy.freed for index in selection])
            changed = self.quantize(parameters, selection)
            self._watched, self._snapshot, self.generation = watched, snapshot, Generation.number
        return changed

    def is_current(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether every 8-bit copy still belongs to these parameters, the same objects as in the set. Runs at every
        call, so it is fast. The generation shows whether another set quantized a shared layer for other weights.
        """
        return self.generation == Generation.number and self.has_same_values(parameters)

    def has_same_values(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether, by addresses and versions, the weights have the same values as when this set was brought up to
        date."""
        assert self._snapshot is not None and self._watched is not None
        return self._snapshot.is_current(self._watched(parameters))

    def begin_check(self) -> bool:
        """See ``Snapshot``: values on a GPU are checked separately from ``is_current``."""
        return self._snapshot is not None and self._snapshot.begin_check()

    def end_check(self) -> bool:
        """See ``Snapshot``."""
        return self._snapshot is None or self._snapshot.end_check()
