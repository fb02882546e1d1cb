"""The cache entry of one model: its lock, and how calibrations are restored from it and saved in it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..analysis import graph_key
from ..best_effort import best_effort, warn_once
from ..cache.cache_store import Cache
from ..cache.calibration_file import Calibration
from ..cache.locks import Lock
from ..graph import AttentionInfo, LayerInfo
from ..graph.attention_info import FAILED
from ..graph.layer_info import Sensitivity
from ..quantization.layer_state import Layer
from ..report.report import Report

_log = logging.getLogger("onlinequant")


_entries: weakref.WeakSet[Entry] = weakref.WeakSet()
_in_vain: set[tuple[Path | None, str]] = set()


class Entry:
    """The cache entry of one graph with one set of weights.

    A process that finds none creates it, and holds its lock from before the first observed call until after the
    compile: other processes that need the same entry wait for it and then load everything.
    """

    def __init__(
        self, cache: Cache, key: str, infos: Sequence[LayerInfo], lock_timeout: float, operations: str = ""
    ) -> None:
        self.key = key
        self._operations = operations
        self._cache = cache
        self._infos = infos
        self._lock_timeout = lock_timeout
        self._lock: Lock | None = None
        self._waited = False
        _entries.add(self)

    def claim(self) -> None:
        """Wait for the entry's lock, unless the entry exists."""
        if not self._waited and not self._cache.has(self.key):
            self._waited = True
            place = (self._cache.root, self.key[:48])
            # After one timeout the process does not wait again for the model's next size.
            self._lock = self._cache.lock(self.key, 0 if place in _in_vain else self._lock_timeout)
            if self._lock is None:
                _in_vain.add(place)
            if self._lock is not None and self._cache.has(self.key):
                self.release()

    def restore(self, layers: Sequence[Layer]) -> bool:
        """Load into ``layers`` what an earlier process observed; if there is nothing, claims the entry and returns
        False."""
        saved = self._cache.load(self.key)
        if saved is None or not self._cache.has(self.key):
            self.claim()  # this may wait until another process has saved the entry
            saved = self._cache.load(self.key) or saved
        if saved is None or not self._matches(saved, layers):
            return False
        for layer, layer_saved in zip(layers, saved.layers, strict=True):
            if not layer.frozen:
                layer.restore(layer_saved, saved.calls, graph_key.weights_part(self.key), self._operations)
        return True

    def load_autotuning(self) -> str | None:
        """The kernel timings that another process measured for this model; see ``Cache.load_autotuning``."""
        return self._cache.load_autotuning(self.key)

    def load_error(self) -> float | None:
        """The error of a step as an earlier process measured it; None if it did not."""
        error = self._cache.load_stats(self.key).get("error")
        return error if isinstance(error, float) and 0 <= error < math.inf else None

    def load_attention(self, attention: Mapping[str, AttentionInfo]) -> None:
        """Fill in what an earlier process learned of ``attention``, by name: the errors in 8 bit, or that the kernel
        does not run."""
        for info in attention.values():
            info.sensitivity = None
        decisions = self._cache.load_stats(self.key, alike=True).get("decisions")
        for decision in decisions if isinstance(decisions, list) else ():
            with contextlib.suppress(KeyError, TypeError, ValueError):  # the file may have been changed
                info = attention[decision["name"]]
                if decision["kind"] != "attention":
                    continue
                if str(decision["reason"]).startswith(FAILED):
                    info.refuse(decision["reason"])
                relative, mae, mse = (float(decision[name]) for name in ("sensitivity", "mae", "mse"))
                info.sensitivity = Sensitivity(relative, mae, mse)

    def save_error(self, report: Report, error: float) -> None:
        """Add the error of a step to the saved statistics."""
        kept = dataclasses.replace(report, error=error, key=self.key)
        with best_effort("cannot save the statistics"):
            self._cache.update_stats(self.key, _json(kept))

    def save_accepted(self, layers: Sequence[Layer], fingerprint: str, report: Report) -> None:
        """Save again how much of its input each layer clips, without which each process would repeat its first 8-bit
        call in float to learn that the ranges are right. ``fingerprint``: of the weights now."""
        if self._is_of(layers, fingerprint):
            with best_effort("cannot save the calibration"):
                self._cache.update_calibration(self.key, self._calibration(layers, report))

    def publish(self, layers: Sequence[Layer], fingerprint: str, report: Report, autotuning: str | None) -> None:
        """Save the calibration, the timings and the report, and release the lock.

        ``fingerprint``: of the weights now.
        """
        report.stats_path = None
        if self._is_of(layers, fingerprint):
            report.key = self.key
            with best_effort("cannot save the calibration"):
                path = self._cache.publish(self.key, self._calibration(layers, report), _json(report), autotuning)
                report.stats_path = None if path is None else str(path)
        # Also if calibration began at another size, whose graph may never be called again.
        for entry in list(_entries):
            if entry._cache.root == self._cache.root and entry.key[:48] == self.key[:48]:
                entry.release()

    def _is_of(self, layers: Sequence[Layer], fingerprint: str) -> bool:
        """Whether the ranges of ``layers`` belong to the weights that the key identifies, and these are still in place:
        since observing, a LoRA may have been loaded, or another graph of the model observed."""
        weights = graph_key.weights_part(self.key)
        state = weights, self._operations
        return fingerprint == weights and all((layer.calibrated_for, layer.calibrated_in) == state for layer in layers)

    def release(self) -> None:
        """Release the lock, so that other processes may create the entry."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _matches(self, saved: Calibration, layers: Sequence[Layer]) -> bool:
        expected = [(info.name, info.kind, info.weight_shape) for info in self._infos]
        if [(layer.name, layer.kind, layer.weight_shape) for layer in saved.layers] != expected:
            return False
        wrong = [of.name for layer, of in zip(layers, saved.layers, strict=True) if not layer.fits(of)]
        if wrong:
            message = "calibrating again: the cached calibration has scales that do not belong to its ranges, of %s"
            warn_once("scales", message, ", ".join(wrong[:3]))
        return not wrong

    def _calibration(self, layers: Sequence[Layer], report: Report) -> Calibration:
        saved = [
            layer.save(info.name, info.kind, info.weight_shape) for info, layer in zip(self._infos, layers, strict=True)
        ]
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        about = {"torch": torch.__version__, "precision": report.precision, "created": now}
        return Calibration(report.model, max(layer.calls for layer in layers), tuple(saved), about)


def _json(report: Report) -> str:
    return json.dumps(report.to_dict(), indent=2, default=repr) + "\n"
