"""The state of one set of weights in one graph, and the lookup by a call's parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch

from .. import fork_locks
from ..analysis import graph_key
from ..analysis.traced_graph import TracedGraph
from ..cache import weights_store
from ..cache.cache_store import Cache
from ..graph import fx_utils
from ..kernels.clip_counting import Seen
from ..quantization import saved_weights
from ..quantization.layer_registry import known_layers
from ..quantization.layer_state import Layer
from ..quantization.saved_weights import SavedCopy, Source
from ..quantization.weight_changes import addresses_and_versions
from ..quantization.weight_identity import weak_key
from ..quantization.weight_set import WeightSet, places
from ..report.report import Report
from ..selection import layer_timing
from .cache_entry import Entry
from .drift import Bounds, Schedule
from .sample import Sample
from .set_registry import known_sets


class WeightState(WeightSet):
    """One set of weights in one graph: its layers and their 8-bit copies, its cache entry and its drift checks.

    Attributes:
        schedule: which calls are drift checks.
        numbers: the bounds of the numbers among the inputs of calls.
        is_compared: whether an 8-bit step was compared with float.
        sample: the last observed call; None once it was compared, or if it never will be.
        entry: its cache entry, from the first call that needs it.
        calibrated_rest: fingerprint of biases and norms when the set was observed; None before.
        saved: indices of the layers whose 8-bit weights are in the cache.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        names: Sequence[str],
        candidates: Sequence[int],
        layers: Sequence[Layer],
        layout: int = 0,
        together: Sequence[Sequence[int]] = (),
        drift_check_every: int = 0,
    ) -> None:
        super().__init__(parameters, names, candidates, layers, layout, together)
        self.schedule = Schedule(drift_check_every)
        self.numbers = Bounds()
        self.is_compared = False
        self.sample: Sample | None = None
        self.entry: Entry | None = None
        self.calibrated_rest: str | None = None
        self.saved: Set[int] = frozenset()
        self._names = names
        self._fingerprint: tuple[Any, str] | None = None

    def fingerprint(self, parameters: Sequence[torch.Tensor], again: bool = True) -> str:
        """The fingerprint of all parameters. ``again=False``: returns the last one while no address and no version has
        changed, since reading every weight takes a fifth of a small step."""
        if self.has_freed():  # freed weights cannot have changed since they were calibrated
            return self.layers[0].calibrated_for
        state = addresses_and_versions(parameters)  # before that: another thread may change a weight meanwhile
        if again or self._fingerprint is None or state != self._fingerprint[0]:
            self._fingerprint = state, graph_key.fingerprint(dict(zip(self._names, parameters, strict=True)))
        return self._fingerprint[1]

    def rest_fingerprint(self, parameters: Sequence[torch.Tensor]) -> str:
        """The fingerprint of the parameters that are not weights of layers. A LoRA does not change them; another
        checkpoint does."""
        return graph_key.fingerprint(self.rest(parameters))

    def sources(self, parameters: Sequence[torch.Tensor], names: Sequence[str]) -> list[Source]:
        """What each layer's 8-bit copy is made of; ``names``: of the layers."""
        weights = (parameters[candidate] for candidate in self._candidates)
        return [
            Source(name, weight, layer.format, layer.smoothing)
            for name, weight, layer in zip(names, weights, self.layers, strict=True)
        ]

    def release_entry(self) -> None:
        """Release the cache entry's lock."""
        entry, self.entry = self.entry, None
        if entry is not None:
            entry.release()

    def forget_calls(self) -> None:
        """Forget what was prepared for calls and the sample, so that their memory is free."""
        super().forget_calls()
        self.sample = None

    def _expire(self, guard: object) -> None:
        super()._expire(guard)
        self.sample = None

    def start_over(self) -> None:
        """Calibrate anew: another checkpoint was loaded into these parameters, or the user requested it."""
        super().start_over()
        self.is_compared = False
        self.sample = None

    def follow(self, parameters: Sequence[torch.Tensor]) -> int:
        """As for ``WeightSet``. After any change activations may differ, even if another set with the same layer has
        quantized the weight already."""
        if not self.has_same_values(parameters):
            self.schedule.restart()
        return super().follow(parameters)

    def drifted(self, seen: Mapping[int, Seen], is_in_doubt: bool = False) -> dict[int, Seen]:
        """The counts of the layers whose inputs no longer fit their ranges, by layer index. ``seen`` holds counts by
        the address of ``qparams`` (``CountingCall``); ``is_in_doubt`` as for ``clip_counting.has_drifted``."""
        found = self._seen(seen)
        return {index: each for index, each in found.items() if self.layers[index].has_drifted(each, is_in_doubt)}

    def are_coarse(self, seen: Mapping[int, Seen]) -> bool:
        """Whether the range of any layer's input is too coarse; ``seen`` as for ``drifted``."""
        return any(self.layers[index].is_coarse(each) for index, each in self._seen(seen).items())

    def _seen(self, seen: Mapping[int, Seen]) -> dict[int, Seen]:
        found = {index: seen.get(self.layers[index].qparams.data_ptr()) for index in self.selection or ()}
        return {index: each for index, each in found.items() if each is not None}


class WeightStates:
    """The sets of weights that one graph was called with, and their shared state.

    Attributes:
        traced: the graph.
        cache: the directory of its cache entries.
        lock: held while the state of any of them changes, or a graph is compiled for it.
        replaced: how many sets in a row were gone after one observed call.
    """

    def __init__(self, traced: TracedGraph, cache: Cache) -> None:
        self.traced = traced
        self.cache = cache
        self.lock = fork_locks.rlock()
        self.replaced = 0
        inputs = traced.inputs
        parameters = {inputs.names[at]: number for number, at in enumerate(inputs.parameters)}
        self.candidates = [parameters[info.weight] for info in traced.infos]
        nodes = fx_utils.placeholders(traced.module)
        self._unread = frozenset(number for number, at in enumerate(inputs.parameters) if not nodes[at].users)
        self._together = layer_timing.together(traced.module)
        readable = traced.weights_of_layers_only if traced.keeps_weights_on_host else frozenset()
        self._hostable = frozenset(i for i, info in enumerate(traced.infos) if info.weight in readable)
        self._by_ids: dict[tuple[int, ...], WeightState] = {}  # by the parameters' identities
        self._all: weakref.WeakSet[WeightState] = weakref.WeakSet()  # including replaced ones
        self._layouts: dict[tuple[Any, ...], int] = {}
        self._kinds: dict[tuple[Any, ...], int] = {}

    def __iter__(self) -> Iterator[WeightState]:
        return iter(list(self._by_ids.values()))  # another thread may add one

    def of(self, parameters: Sequence[torch.Tensor]) -> WeightState:
        """The set of a call's parameters: a known one, its successor if some weights were replaced, or a new one."""
        state = self._by_ids.get(tuple(map(id, parameters)))
        return state if state is not None and state.alive else self._find(parameters)

    def _find(self, parameters: Sequence[torch.Tensor]) -> WeightState:
        with self.lock:
            named = self.traced.inputs.named_parameters(parameters)
            known = known_sets.predecessor(named)
            layers = self._layers(parameters, known)
            layout = tuple((parameter.stride(), parameter.dtype) for parameter in parameters)
            state = WeightState(
                parameters,
                self.traced.inputs.parameter_names,
                self.candidates,
                layers,
                self._layouts.setdefault(layout, len(self._layouts)),
                self._together,
                self.traced.config.drift_check_every,
            )
            state.hostable, state.unread = self._hostable, self._unread
            if any(layer.frozen for layer in layers):  # by another graph, possibly before a LoRA was loaded
                state.schedule.restart()
            # The results for the model also hold with a LoRA.
            state.is_compared = any(old is known and old.is_compared for old in self)
            known_sets.add(state)
            for old in self:
                if old.is_dead() or known_sets.is_successor(named, old):
                    self.replaced += old.is_dead() and old.was_called_once()
                    self._retire(old)
            self._by_ids[state.ids] = state
            self._all.add(state)
            return state

    def _layers(self, parameters: Sequence[torch.Tensor], known: WeightSet | None) -> list[Layer]:
        """The layer of each candidate, taken from ``known``, a set of the same model, where possible."""
        traced, names = self.traced, self.traced.inputs.parameter_names
        # A second layer may have got the same weight since this graph was traced.
        numbers = places(id(parameters[candidate]) for candidate in self.candidates)
        numbers_of_names = places(self.candidates)
        return [
            known_layers.layer(
                parameters[candidate],
                info.geometry,
                traced.precision.format,
                traced.config.calibration_method,
                old=known.layer(names[candidate], of_name) if known else None,
                place=number,
            )
            for info, candidate, number, of_name in zip(
                traced.infos, self.candidates, numbers, numbers_of_names, strict=True
            )
        ]

    def _retire(self, old: WeightState) -> None:
        """Release the resources of a set that another one replaces. It stays known for as long as it can be called: its
        weights may be put back, or another model may share them."""
        if not old.alive:
            del self._by_ids[old.ids]
        old.forget_calls()
        old.release_entry()

    def kind(self, state: WeightState, chosen: tuple[int, ...]) -> int:
        """A number that is equal for sets that can share one compiled graph: those with the same memory layout, the
        same layers ``chosen``, equal smoothing of these, and the same attention in 8 bit."""
        factors = state.smoothing()
        alike = list(factors.values())
        pattern = tuple((index, alike.index(each)) for index, each in factors.items())
        attention = tuple((name, info.quantized) for name, info in self.traced.attention.items() if info.is_replaced)
        return self._kinds.setdefault((state.layout, chosen, pattern, attention), len(self._kinds))

    def entry(self, state: WeightState, parameters: Sequence[torch.Tensor]) -> Entry:
        """The set's cache entry."""
        if state.entry is None:
            traced = self.traced
            how = traced.config, traced.precision, traced.device, traced.state, traced.operations
            key = graph_key.entry_key(traced.module, traced.infos, state.fingerprint(parameters), *how)
            traced.report.key = key
            entry = state.entry = Entry(self.cache, key, traced.infos, traced.config.lock_timeout, traced.operations)
            weakref.finalize(weak_key(parameters[0]), entry.release).atexit = False  # the model was dropped
        return state.entry

    def publish(self, state: WeightState, parameters: Sequence[torch.Tensor], report: Report) -> None:
        """Save the results for a set, with ``report``."""
        traced = self.traced
        is_timed = traced.provider.times_layers
        autotuning = layer_timing.dump(traced.module, traced.precision.format, traced.device) if is_timed else None
        entry = self.entry(state, parameters)
        entry.publish(state.layers, state.fingerprint(parameters), report, autotuning)
        if traced.config.save_weights and report.stats_path is not None and not state.has_freed():
            self._save_weights(state, parameters, entry)
        named = traced.inputs.named_parameters(parameters)
        for other in list(self._all):  # sets that were in the model while it was observed
            if other is not state and other.entry is not None and known_sets.is_successor(named, other):
                other.release_entry()

    def saved_weights(self, state: WeightState, parameters: Sequence[torch.Tensor]) -> dict[int, SavedCopy]:
        """The saved 8-bit weights of a set's layers, by index, if that is wanted and there are any."""
        if not self.traced.config.save_weights or state.has_freed():
            return {}
        key = self.entry(state, parameters).key
        file = weights_store.load(self.cache, key)
        if file is None:
            return {}

        def damaged() -> None:
            state.saved = frozenset()
            weights_store.discard(self.cache, key, "the checksum of a weight is wrong")

        found = saved_weights.matching(file, state.sources(parameters, self._names()), damaged)
        state.saved = frozenset(found)
        return found

    def _save_weights(self, state: WeightState, parameters: Sequence[torch.Tensor], entry: Entry) -> None:
        """Save the 8-bit weights of a set's selected layers, unless all were read from the cache."""
        sources = state.sources(parameters, self._names())
        selected = {sources[i].name: i for i in state.selection or () if sources[i].can_be_saved()}
        if set(selected.values()) <= state.saved:
            return
        wanted = [sources[i] for i in selected.values()]
        outline = [source.outline() for source in wanted]
        weights_store.publish(self.cache, entry.key, self.traced.report.model, outline, saved_weights.made(wanted))
        state.saved = frozenset(selected.values())

    def _names(self) -> list[str]:
        return [info.name for info in self.traced.infos]

    def unlock_entries(self) -> None:
        """Release the locks of entries that this process failed to create."""
        for state in list(self._all):
            if state.entry is not None:
                state.entry.release()
