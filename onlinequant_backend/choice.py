"""Which layers of a graph run in 8 bit, decided when observing is over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from . import selection
from .config import QuantConfig
from .passes import SELECT, LayerInfo, PassContext, layer_nodes, run_passes
from .precision import Precision
from .report import Report
from .sensitivity import estimate_by_gradient, over_budget
from .weights import WeightSet

_log = logging.getLogger("onlinequant")


class Choice:
    """The choice for one graph: what ``LayerInfo.quantized`` and ``reason`` of each layer say.

    ``observed`` gives the graph with observers, ``may_repeat`` says whether it may be run twice.

    Attributes:
        is_made: whether there is one.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        infos: Sequence[LayerInfo],
        config: QuantConfig,
        precision: Precision,
        device: torch.device,
        report: Report,
        observed: Callable[[], fx.GraphModule],
        may_repeat: bool,
    ) -> None:
        self.is_made = False
        self._graph = graph_module
        self._infos = infos
        self._config = config
        self._precision = precision
        self._device = device
        self._report = report
        self._observed = observed
        self._may_repeat = may_repeat

    def make(
        self,
        args: Sequence[Any],
        weights: WeightSet,
        refusals: Sequence[str | None],
        load_autotuning: Callable[[], str | None],
    ) -> None:
        """Select from what is known of the layers of ``weights``; ``refusals``: what rules each out, or None.

        ``args``: of a call. ``load_autotuning``: what is known of the speed of such layers, see ``Cache``.
        """
        self._rank(args, weights)
        context = PassContext(
            self._config,
            self._precision,
            measured=True,
            unusable={info.name: why for info, why in zip(self._infos, refusals, strict=True) if why is not None},
            freed=frozenset(index for index, layer in enumerate(weights.layers) if layer.freed),
            device=self._device,
        )
        if context.measures_speed:
            selection.restore(load_autotuning())
            slow = selection.measure(self._graph, self._precision.format, self._device)
            context.unusable = {**slow, **context.unusable}
        run_passes(self._graph, SELECT, context)
        if self._config.max_error is not None:
            self._hold_budget(self._config.max_error, args, weights)
        self.is_made = True
        self._report.decisions = [info.decision() for _, info in layer_nodes(self._graph)]

    def _rank(self, args: Sequence[Any], weights: WeightSet) -> None:
        """Say how sensitive each layer is; where that decides anything, by what it does to the model's output."""
        percentages = (self._config.quantized_conv_percentage, self._config.quantized_linear_percentage)
        decides = self._config.max_error is not None or any(0 < percentage < 100 for percentage in percentages)
        measured = [layer.sensitivity for layer in weights.layers if layer.sensitivity is not None]
        asked = self._config.sensitivity == "gradient" and decides and not all(found.of_model for found in measured)
        if asked and self._may_repeat and not weights.has_freed():
            estimate_by_gradient(self._observed(), args, weights.layers)
        for info, layer in zip(self._infos, weights.layers, strict=True):
            info.sensitivity = layer.sensitivity
        of_model = any(info.sensitivity is not None and info.sensitivity.of_model for info in self._infos)
        self._report.sensitivity_kind = self._config.sensitivity if of_model else "local"

    def _hold_budget(self, max_error: float, args: Sequence[Any], weights: WeightSet) -> None:
        """Leave the most sensitive layers in float until a step's error is within the budget."""
        if not self._may_repeat or weights.has_freed():
            _log.warning("max_error=%g is not checked: this graph cannot be run twice", max_error)
            return
        chosen = [index for index, info in enumerate(self._infos) if info.quantized]
        chosen.sort(key=lambda index: -self._infos[index].error)
        number, error = over_budget(self._observed(), args, weights.layers, chosen, max_error)
        for rank, index in enumerate(chosen[:number], start=1):
            info = self._infos[index]
            info.quantized = False
            kept = f"max_error={max_error:g} keeps the last {len(chosen) - number}"
            info.reason = f"sensitivity {info.error:.3g} ranks {rank} of {len(chosen)}; {kept}"
        self._report.error = error
