"""The real SD1.5, at full size, goes through every pass. Shapes only: no memory, no arithmetic."""

from __future__ import annotations

import torch

from benchmarks.model_coverage import analyzed_layers, summary
from benchmarks.models import GPU_THRESHOLDS, build
from onlinequant_backend.config import QuantConfig


def test_sd15() -> None:
    model, inputs = build("sd15", "meta", torch.float16, batch=2)
    layers = analyzed_layers(model, inputs, QuantConfig(**GPU_THRESHOLDS))
    # 98 convolutions, of which conv_in and conv_out are too thin, and 14 are shortcuts; 184 linears, 20 of them dense.
    assert summary("sd15", layers) == ["sd15", "1.35", "98", "2", "14", "82", "184", "164", "0", "20", "77.7%"]
    names = {name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert {info.name for info in layers} == names
    assert all(info.reason for info in layers)
