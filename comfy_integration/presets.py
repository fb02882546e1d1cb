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
    # The most sensitive tenth makes half of a step's error: of the model of scenes' in int8, 0.0030 instead of 0.0056 is
    # left (pictures at 47.6 dB instead of 44.4), and 0.0025 without a fifth.
    "faithful": {**_FAST, "quantized_conv_percentage": 90, "quantized_linear_percentage": 90},
}
