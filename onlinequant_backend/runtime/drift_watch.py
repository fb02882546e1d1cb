"""Runs 8-bit graphs and checks them for drift: adapts ranges to the activations and replaces non-finite results."""

from __future__ import annotations

import logging
import math
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..kernels import clip_counting
from ..quantization.observation import Observation
from ..quantization.weight_streaming import streaming
from ..tensors import relative_error
from . import drift
from .extents import Extents

if TYPE_CHECKING:
    from ..analysis.traced_graph import TracedGraph
    from ..compilation.compiled_graph import CompiledGraph
    from .sample import Sample
    from .sampling import SamplingRun
    from .weight_state import WeightState

_log = logging.getLogger("onlinequant")


# The most changes of ranges for one call.
_MOST_CHANGES = 32
# A range wider than before by this factor may be too coarse for most values in it.
_FAR = 2
# The share of a layer's inputs that quantization errors of earlier layers may push beyond a range that is right in
# float: in an input with few distinct values, one of them is a large share.
_ADDED = 0.01


class DriftWatch:
    """Watches one graph.

    ``keep_error`` receives the set of weights and the error of a step with it. ``keep_accepted`` receives a call's
    arguments and the set after a float call has shown that its ranges are right although 8-bit inputs exceed them.
    ``key``: identifies the compiled graph of a call.
    """

    def __init__(
        self,
        traced: TracedGraph,
        keep_error: Callable[[WeightState, float], None] = lambda weights, error: None,
        keep_accepted: Callable[[Sequence[Any], WeightState], None] = lambda args, weights: None,
        key: Callable[[Sequence[Any], WeightState], object] = lambda args, weights: None,
    ) -> None:
        self._keep_error = keep_error
        self._keep_accepted = keep_accepted
        self._key = key
        self._traced = traced
        self._report = traced.report
        self._errors: weakref.WeakKeyDictionary[WeightState, float] = weakref.WeakKeyDictionary()
        # Sets whose ranges have changed since the error was measured.
        self._changed: weakref.WeakSet[WeightState] = weakref.WeakSet()
        # Masks of non-finite values in the last computed float result.
        self._nonfinite: list[torch.Tensor] = []
        self._said = False
        self._extents = Extents(traced.inputs.others)

    def run(
        self, compiled: CompiledGraph, args: Sequence[Any], weights: WeightState, run: SamplingRun | None = None
    ) -> tuple[Any, bool]:
        """The 8-bit result of a call and True, or its float result and False if the call is outside the observed
        ranges. ``run``: the sampling run that the call belongs to.
        """
        device = weights.layers[0].device
        is_capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        result, seen = self._call(compiled, args, weights, run, is_capturing)
        drifted: Mapping[int, clip_counting.Seen] = {}
        # On a GPU, checking every result would keep the caller from preparing the next step meanwhile.
        looks = seen is not None or device.type == "cpu"
        if seen is not None:
            is_in_doubt = weights.schedule.is_in_doubt and self._may_run_float(weights)
            drifted = weights.drifted(seen, is_in_doubt)
            if drifted and is_in_doubt:
                weights.schedule.settle()
            if weights in self._changed and weights.are_coarse(seen):  # in case larger inputs have widened a range
                self._changed.discard(weights)
                weights.is_compared = False
        is_nonfinite = (
            looks
            and not drift.is_finite(result)
            and not drift.are_same_masks(drift.nonfinite_masks(result), self._nonfinite)
        )
        if drifted or is_nonfinite:
            return self._follow(compiled, args, weights, drifted, is_nonfinite, result)
        if not weights.is_compared and not is_capturing:
            self._compare(compiled, args, weights, result)
        return result, True

    def _call(
        self,
        compiled: CompiledGraph,
        args: Sequence[Any],
        weights: WeightState,
        run: SamplingRun | None,
        is_capturing: bool,
    ) -> tuple[Any, dict[int, clip_counting.Seen] | None]:
        """The 8-bit result, and what a drift check counted if one was due."""
        device = weights.layers[0].device
        looks = weights.schedule.is_on and not is_capturing
        have_changed = self._extents.begin(args, device) if looks else lambda: False
        # On a GPU the answer is awaited only when all kernels of the step are queued, if the step can be repeated.
        is_late = self._extents.are_late(device) and self._traced.may_repeat
        is_due = weights.schedule.is_due(run, not is_late and have_changed()) and not is_capturing
        result = None if is_due else compiled(args, weights)
        if is_late and have_changed():
            is_due = True
            weights.schedule.doubt()
        return compiled.count(args, weights) if is_due else (result, None)

    def _compare(self, compiled: CompiledGraph, args: Sequence[Any], weights: WeightState, result: Any) -> None:
        """Report the error of quantization: ranges may cover all values and still be too coarse, as with strong
        outliers."""
        weights.is_compared = True
        sample, weights.sample = weights.sample, None
        if not self._may_run_float(weights) or self._traced.is_random or not weights.selection:
            return
        try:
            with torch.no_grad():
                if sample is not None and self._is_alike(sample, args, weights):
                    # Without a float step, whose activations take the most memory.
                    error = relative_error(compiled.once(sample.args(args), weights), sample.result)
                else:
                    error = relative_error(result, self._traced.in_float(args))
        except Exception:  # for example out of memory
            _log.info("the error of a step is not measured", exc_info=True)
            return
        if not math.isfinite(error):
            return
        self._errors[weights] = error
        self._report.error = max(self._errors.values())  # several models may share a graph
        self._keep_error(weights, error)
        for warning in self._report.warnings():
            _log.warning("%s: %s", self._report.model, warning)

    def _is_alike(self, sample: Sample, args: Sequence[Any], weights: WeightState) -> bool:
        """Whether a call has the sizes and the parameters of an earlier one."""
        parameters = self._traced.inputs.take_parameters(args)
        are_same = weights.fingerprint(parameters) == sample.fingerprint
        return are_same and self._key(sample.args(args), weights) == self._key(args, weights)

    def _follow(
        self,
        compiled: CompiledGraph,
        args: Sequence[Any],
        weights: WeightState,
        drifted: Mapping[int, clip_counting.Seen],
        is_nonfinite: bool,
        result: Any,
    ) -> tuple[Any, bool]:
        """Change ranges in place, which needs no recompile, and repeat the call. Returns as ``run``."""
        if is_nonfinite and not self._said:
            self._said = True
            _log.warning("an 8-bit step gave a result that is not finite; such steps run in float")
        ways: list[tuple[Callable[[], Any], bool]] = [
            (lambda: self._step(compiled, args, weights, drifted, result), True)
        ]
        if self._may_run_float(weights):
            in_float = [lambda: self._observe(args, weights, drifted), lambda: self._run_float(args, weights)]
            ways = [*((way, False) for way in in_float), *ways]
        is_in_8_bit = True
        with weights.layers[0].lock, torch.no_grad():
            for way, is_8_bit in ways:
                try:
                    result, is_in_8_bit = way(), is_8_bit
                    break
                except Exception:  # for example out of memory
                    _log.exception("a call that does not fit the observed ranges cannot be repeated")
        self._nonfinite = [] if drift.is_finite(result) else drift.nonfinite_masks(result)
        return result, is_in_8_bit

    def _may_run_float(self, weights: WeightState) -> bool:
        """Whether a call can be repeated in float."""
        return self._traced.may_repeat and not weights.has_freed()

    def _observe(self, args: Sequence[Any], weights: WeightState, drifted: Mapping[int, clip_counting.Seen]) -> Any:
        """The float result; sets the ranges to what this call needs."""
        observation = Observation(weights.layers, refitting=weights.selection or (), drifted=drifted)
        before = _growth(weights)
        with streaming():
            result = self._traced.observed(*args, observation)
        self._note(weights, {i: seen for i, seen in drifted.items() if i not in observation.lost}, before)
        if observation.lost:  # the next call may not be observed either
            weights.schedule.restart(in_float=True)
        elif all(growth == 1 for growth in _growth(weights)):
            self._keep_accepted(args, weights)
        return result

    def _run_float(self, args: Sequence[Any], weights: WeightState) -> Any:
        """The float result; ranges do not change, so the next call is checked as well."""
        result = self._traced.in_float(args)
        weights.schedule.restart(in_float=True)
        return result

    def _step(
        self,
        compiled: CompiledGraph,
        args: Sequence[Any],
        weights: WeightState,
        drifted: Mapping[int, clip_counting.Seen],
        result: Any,
    ) -> Any:
        """The 8-bit result after ranges were changed until they fit, or once if a call cannot be repeated."""
        for _ in range(_MOST_CHANGES):
            before = _growth(weights)
            drifted = {index: seen for index, seen in drifted.items() if weights.layers[index].is_finite(seen)}
            for index, seen in drifted.items():
                weights.layers[index].step(seen)
            self._note(weights, drifted, before)
            if not drifted or not self._traced.may_repeat:
                break
            result, all_seen = compiled.count(args, weights)
            drifted = weights.drifted(all_seen)
        return result

    def _note(self, weights: WeightState, drifted: Mapping[int, clip_counting.Seen], before: Sequence[float]) -> None:
        """Report which ranges differ from ``before``, and schedule a check if any does."""
        after = _growth(weights)
        for index, seen in drifted.items():
            is_right_in_float = after[index] == before[index] and seen.clipped_of_many < _ADDED
            if after == before or is_right_in_float:  # another check would only slow down the next call
                weights.layers[index].accept(seen)
        if after == before:
            return
        self._changed.add(weights)
        if any(new > _FAR * old for new, old in zip(after, before, strict=True)):
            weights.is_compared = False  # the new range may be too coarse for other values
        names = (info.name for info in self._traced.infos)
        self._report.widened = {name: factor for name, factor in zip(names, after, strict=True) if factor != 1}
        _log.info("activations have changed, and the ranges of %d layers with them", len(self._report.widened))
        # A range that became narrower is wrong for the next calls if they need the old one.
        weights.schedule.restart(checks_all=any(map(operator.lt, after, before)), in_float=True)


def _growth(weights: WeightState) -> list[float]:
    return [layer.growth for layer in weights.layers]
