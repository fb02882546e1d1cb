"""The choice of the layers of a graph that are quantized, made after observing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..analysis.traced_graph import TracedGraph
from ..graph.attention_info import all_infos
from ..passes import SELECT, PassContext, run_passes
from ..quantization.weight_set import WeightSet
from ..report import NodeDecision
from . import layer_timing
from .attention_choice import choose_attention
from .sensitivity import estimate_by_gradient, over_budget

_log = logging.getLogger("onlinequant")


class LayerChoice:
    """The choice for one graph, recorded in each layer's ``LayerInfo.quantized`` and ``reason``.

    Attributes:
        is_made: whether the choice was made.
    """

    def __init__(self, traced: TracedGraph) -> None:
        self.is_made = False
        self._traced = traced

    def make(
        self,
        args: Sequence[Any],
        weights: WeightSet,
        refusals: Sequence[str | None],
        load_autotuning: Callable[[], str | None],
    ) -> None:
        """Select among the layers of ``weights``; ``refusals``: for each, why it cannot be quantized, or None.
        ``args``: of a call. ``load_autotuning``: loads the measured times of such layers, see ``Cache``.
        """
        self._rank(args, weights)
        context = PassContext(
            self._traced.config,
            self._traced.precision,
            measured=True,
            unusable={
                info.name: why for info, why in zip(self._traced.infos, refusals, strict=True) if why is not None
            },
            freed=frozenset(index for index, layer in enumerate(weights.layers) if layer.copy.freed),
            device=self._traced.device,
        )
        slow: dict[str, str] = {}
        if context.measures_speed:
            layer_timing.restore(load_autotuning(), self._traced.device)
            saves_memory = self._traced.config.float_weights == "host" and self._traced.keeps_weights_on_host
            slow = layer_timing.measure(
                self._traced.module, self._traced.precision.format, self._traced.device, saves_memory
            )
            context.unusable = {**slow, **context.unusable}
        run_passes(self._traced.module, SELECT, context)
        if self._traced.config.max_error is not None:
            self._hold_budget(self._traced.config.max_error, args, weights)
        choose_attention(self._traced.module, context, slow)
        self.is_made = True
        self._traced.report.decisions = [NodeDecision.of(info) for info in all_infos(self._traced.module)]

    def _rank(self, args: Sequence[Any], weights: WeightSet) -> None:
        """Record each layer's sensitivity; if the decision depends on it, measured at the model's output."""
        percentages = (self._traced.config.quantized_conv_percentage, self._traced.config.quantized_linear_percentage)
        decides = self._traced.config.max_error is not None or any(0 < percentage < 100 for percentage in percentages)
        measured = [layer.sensitivity for layer in weights.layers if layer.sensitivity is not None]
        asked = (
            self._traced.config.sensitivity == "gradient" and decides and not all(found.of_model for found in measured)
        )
        if asked and self._traced.may_repeat and not weights.has_freed():
            estimate_by_gradient(self._traced.observed, args, weights.layers)
        for info, layer in zip(self._traced.infos, weights.layers, strict=True):
            info.sensitivity = layer.sensitivity
        of_model = any(info.sensitivity is not None and info.sensitivity.of_model for info in self._traced.infos)
        self._traced.report.sensitivity_kind = self._traced.config.sensitivity if of_model else "local"

    def _hold_budget(self, max_error: float, args: Sequence[Any], weights: WeightSet) -> None:
        """Leave the most sensitive layers in float until a step's error is within the budget."""
        if not self._traced.may_repeat or weights.has_freed():
            _log.warning("max_error=%g is not checked: this graph cannot be run twice", max_error)
            return
        chosen = [index for index, info in enumerate(self._traced.infos) if info.quantized]
        chosen.sort(key=lambda index: -self._traced.infos[index].error)
        number, error = over_budget(self._traced.observed, args, weights.layers, chosen, max_error)
        for rank, index in enumerate(chosen[:number], start=1):
            info = self._traced.infos[index]
            info.quantized = False
            kept = f"max_error={max_error:g} keeps the last {len(chosen) - number}"
            info.reason = f"sensitivity {info.error:.3g} ranks {rank} of {len(chosen)}; {kept}"
        self._traced.report.error = error
