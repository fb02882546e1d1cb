"""Settings by name, for those who do not want to know what each widget does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CUSTOM = "custom"
_FAST: Mapping[str, Any] = {
    "quantized_conv_percentage": 100,
    "quantized_linear_percentage": 100,
    "conv_compute_density_threshold": 0,
    "linear_compute_density_threshold": 0,
    "precision": "auto",
    "selection": "auto",
    "exclude": "",
    "cuda_graphs": "auto",
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": _FAST,
    # The most sensitive tenth makes half of a step's error: of 0.0056 in int8, on the model of scenes, 0.0030 are left,
    # and 0.0025 without a fifth. Pictures are at 47.6 dB instead of 44.4.
    "faithful": {**_FAST, "quantized_conv_percentage": 90, "quantized_linear_percentage": 90},
}
