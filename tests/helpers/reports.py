"""A report as a model leaves it, without a model."""

from __future__ import annotations

from typing import Any

from onlinequant_backend.report.report import NodeDecision, Report


def layers(report: Report) -> list[NodeDecision]:
    """What was decided for layers with weights: attention stays in float on CPUs."""
    return [decision for decision in report.decisions if decision.kind != "attention"]


def decision(**changes: Any) -> NodeDecision:
    values: dict[str, Any] = {
        "name": "down_blocks.0.resnets.0.conv1",
        "kind": "conv",
        "shape": (2, 320, 128, 128),
        "weight_shape": (320, 320, 3, 3),
        "flops": 60_397_977_600,
        "bytes": 43_786_240,
        "density": 1379.4,
        "sensitivity": 0.0123,
        "mae": 0.004,
        "mse": 0.00002,
        "quantized": True,
        "reason": "selected",
    }
    return NodeDecision(**{**values, **changes})


def made(**changes: Any) -> Report:
    unmeasured = {"sensitivity": None, "mae": None, "mse": None, "quantized": False}
    values: dict[str, Any] = {
        "model": "UNet2DConditionModel",
        "phase": "quantized",
        "phase_reason": "8-bit layers compiled by Inductor",
        "precision": "int8",
        "precision_reason": "this CPU has avx512_vnni",
        "calls_observed": 20,
        "calibration_steps": 20,
        "compile_seconds": 12.5,
        "key": "00ff",
        "config": {"conv_compute_density_threshold": 100, "linear_compute_density_threshold": 300},
        "decisions": [
            decision(),
            decision(name="conv_in", density=35.0, reason="density 35 is below the threshold of 100", **unmeasured),
            decision(name="to_k", kind="linear", reason="density 129 is below the threshold of 300", **unmeasured),
            decision(name="to_v", kind="linear", reason="density 128 is below the threshold of 300", **unmeasured),
            decision(name="to_out.0", kind="linear", reason="excluded by 'to_out*'", **unmeasured),
        ],
    }
    return Report(**{**values, **changes})
