"""What is said where a graph stays in float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from onlinequant_backend import backend
from tests.graph_probe import EIGHT_BITS, GraphProbe


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        (
            {"quantized_conv_percentage": 0, "quantized_linear_percentage": 0},
            "both percentages are 0: raise quantized_conv_percentage or quantized_linear_percentage",
        ),
        (
            {"conv_compute_density_threshold": 500, "linear_compute_density_threshold": 600},
            "all layers are below the thresholds (conv_compute_density_threshold=500; "
            "linear_compute_density_threshold=600): lower these",
        ),
        (
            {"quantized_conv_percentage": 0, "linear_compute_density_threshold": 600},
            "no layer qualifies: 2 conv layers: quantized_conv_percentage is 0, "
            "1 linear layers: density is below linear_compute_density_threshold=600",
        ),
    ],
)
def test_where_nothing_qualifies_the_reason_names_what_to_change(options: dict[str, Any], expected: str | None) -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Linear(12, 16), nn.ReLU())
    probe = GraphProbe(net, torch.empty(2, 8, 16, 16), **options).analyze()
    assert backend._why_float(probe.infos, EIGHT_BITS, []) == expected


def test_excluding_everything_is_called_that() -> None:
    probe = GraphProbe(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.empty(8, 8), exclude=("*",)).analyze()
    assert backend._why_float(probe.infos, EIGHT_BITS, []) == "exclude matches all layers"
