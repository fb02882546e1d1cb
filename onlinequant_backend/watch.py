"""Runs 8-bit graphs and looks at what they do: outgrown ranges are widened, and nothing non-finite gets out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import drift
from .calibration import Observation

if TYPE_CHECKING:
    from .build import CompiledGraph
    from .sampling import SamplingRun
    from .traced import TracedGraph
    from .weights import WeightSet

_log = logging.getLogger("onlinequant")


class Watch:
    """Watches one graph."""

    def __init__(self, traced: TracedGraph) -> None:
        self._traced = traced
        self._report = traced.report
        self._expects_finite = True
        self._said = False

    def run(
        self, compiled: CompiledGraph, args: Sequence[Any], weights: WeightSet, run: SamplingRun | None = None
    ) -> Any:
        """The 8-bit result of a call, or the float one of a call that is outside of the observed ranges.

        ``run``: the sampling run that the call belongs to.
        """
        device = weights.layers[0].device
        due = weights.schedule.is_due(run) and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        if not due:
            result = compiled(args, weights)
            # On a GPU, to look at every result would keep the caller from preparing the next step meanwhile.
            outgrown: Mapping[int, float] = {}
            looks = device.type == "cpu"
        else:
            result, shares = compiled.count(args, weights)
            outgrown = weights.outgrown(shares)
            looks = True
        is_lost = looks and self._expects_finite and not drift.is_finite(result)
        if not (outgrown or is_lost):
            return result
        try:
            return self._follow(args, weights, outgrown, is_lost, result)
        except Exception:  # out of memory, say
            _log.exception("the observed ranges cannot be widened")
            return result

    def _follow(
        self, args: Sequence[Any], weights: WeightSet, outgrown: Mapping[int, float], is_lost: bool, result: Any
    ) -> Any:
        """Widen ranges, in place, so that nothing is compiled again."""
        if is_lost and not self._said:
            self._said = True
            _log.warning("an 8-bit step gave numbers that are not finite; such steps are done in float")
        with weights.layers[0].lock, torch.no_grad():
            if self._traced.may_repeat and not weights.has_freed():
                selection = weights.selection or ()
                result = self._traced.observed(*args, Observation(weights.layers, widening=selection))
                self._expects_finite = not is_lost or drift.is_finite(result)
            else:
                for index in outgrown:
                    weights.layers[index].widen()
                self._expects_finite = not is_lost
        growth = {info.name: layer.growth for info, layer in zip(self._traced.infos, weights.layers, strict=True)}
        known = self._report.widened
        self._report.widened = {name: factor for name, factor in growth.items() if factor > 1}
        if self._report.widened != known:
            _log.info("larger values than observed: the ranges of %d layers are wider now", len(self._report.widened))
            weights.schedule.restart()
        else:  # looking again would only make the next call slow as well
            for index, share in outgrown.items():
                weights.layers[index].clipped = max(weights.layers[index].clipped, share)
        return result
