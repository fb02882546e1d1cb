"""Keys, calibrations and statistics to test the cache with. Needs no torch; see ``cache_process``."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from onlinequant_backend.cache.calibration_file import Calibration, LayerCalibration


def key(portable: str = "a", weights: str = "b", machine: str = "c", graph: str = "d") -> str:
    """A key of four parts, each of which repeats one hex digit."""
    return "".join(digit * 16 for digit in (portable, weights, machine, graph))


KEY = key()
SIBLING = key(graph="e")
OTHER_MACHINE = key(machine="f")
LAYER = LayerCalibration(
    name="down_blocks.0.attn.to_q",
    kind="linear",
    weight_shape=(320, 320),
    minimum=-1.5,
    maximum=3.25,
    qparams=(64.0, 81.0, 0.015625),
    sensitivity=(0.01, 0.002, 1e-30, True),
    lowest_peak=2.5,
    clipped=0.125,
    smoothing=(0.5, *[1.0] * 319),
)
NEVER_FINITE = LayerCalibration("conv_in", "conv", (320, 4, 3, 3), -math.inf, math.nan, None, None)
CALIBRATION = Calibration("UNet2DConditionModel", 20, (NEVER_FINITE, LAYER), {"torch": "2.13.0", "device": "cpu"})
STATS = json.dumps(
    {
        "model": CALIBRATION.model,
        "counts": {"quantized_conv": 0, "candidates_conv": 1, "quantized_linear": 1, "candidates_linear": 1},
    }
)


def calibration(**changes: Any) -> Calibration:
    """``CALIBRATION`` with some fields changed."""
    return dataclasses.replace(CALIBRATION, **changes)


def content(calibration: Calibration | None) -> bytes | None:
    """What tells calibrations apart; ``==`` cannot, since a NaN in it is never equal to itself."""
    return None if calibration is None else calibration.to_bytes(KEY)
