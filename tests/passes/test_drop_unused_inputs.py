from __future__ import annotations

import torch
import torch.nn.functional as F

from onlinequant_backend.graph import fx_utils
from onlinequant_backend.passes.drop_unused_inputs import drop_unused_inputs
from onlinequant_backend.passes.quantize_inputs import quantize_inputs
from onlinequant_backend.passes.rewrite_linear import rewrite_linear
from tests.helpers.graph_probe import GraphProbe, WithWeight
from tests.helpers.tiny import net, noise


def test_float_weights_of_8_bit_layers_go() -> None:
    probe = GraphProbe(net(), noise(1, 4, 8, 8), quantized_conv_percentage=0).analyze()
    probe.run(quantize_inputs, rewrite_linear)
    assert probe.run(drop_unused_inputs) == {"drop_unused_inputs": 4}
    assert probe.after.counts - probe.before.counts == {}
    assert probe.added("placeholder") == -4
    left = {node.name for node in fx_utils.placeholders(probe.graph_module)}
    for info in probe.infos:
        assert (info.weight in left) is (not info.quantized)
        assert info.quantized or info.reason == "quantized_conv_percentage is 0"
    probe.assert_settled(drop_unused_inputs)


def test_casts_in_front_of_them_go_too() -> None:
    module = WithWeight(lambda x, w: F.linear(x.half(), w.bfloat16().to(torch.float16)), 8, 8)
    probe = GraphProbe(module, noise(2, 8)).analyze()
    probe.run(quantize_inputs, rewrite_linear)
    # The weight and its two casts; the input's cast is still read.
    assert probe.run(drop_unused_inputs) == {"drop_unused_inputs": 3}
    assert (probe.added("placeholder"), probe.added("bfloat16"), probe.added("to")) == (-1, -1, -1)
    assert probe.after.counts["half"] == 1
    probe.assert_settled(drop_unused_inputs)


def test_calls_that_write_in_place_stay() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, w)
        y.relu_()
        return y

    probe = GraphProbe(WithWeight(forward, 8, 8), noise(2, 8))
    probe.assert_settled(drop_unused_inputs)
    assert probe.after.counts["relu_"] == 1
