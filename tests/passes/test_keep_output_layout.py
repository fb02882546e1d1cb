from __future__ import annotations

import pytest
import torch
from torch import nn

from onlinequant_backend.passes import REWRITE
from onlinequant_backend.passes.keep_output_layout import keep_output_layout
from tests.graph_probe import GraphProbe, host_precision
from tests.tiny import noise

CONTIGUOUS = torch.ops.aten.contiguous.default
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Twice(nn.Module):
    """Returns a convolution's output and a row of numbers."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        return y, y.mean((0, 2, 3))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("conv", "x"), [(nn.Conv2d(4, 8, 3), noise(1, 4, 8, 8)), (nn.Conv3d(4, 8, (3, 1, 1)), noise(1, 4, 5, 8, 8))]
)
def test_outputs_keep_the_float_graphs_strides(conv: nn.Module, x: torch.Tensor, channels_last: bool) -> None:
    if channels_last:
        conv, x = conv.to(memory_format=LAYOUTS[x.dim()]), x.contiguous(memory_format=LAYOUTS[x.dim()])
    probe = GraphProbe(conv, x, precision=host_precision()).analyze()
    layers = probe.observe()
    changes = probe.run(*REWRITE)
    assert changes["keep_output_layout"] == probe.added(CONTIGUOUS) == 1
    (result,) = probe.call_quantized(layers)
    assert result.stride() == conv(x).stride()


def test_only_pictures_are_laid_out() -> None:
    probe = GraphProbe(Twice(nn.Conv2d(4, 8, 3)), noise(1, 4, 8, 8)).analyze()
    assert probe.run(keep_output_layout) == {"keep_output_layout": 1}
    picture, numbers = probe.graph_module.graph.output_node().args[0]
    assert (picture.target, numbers.target) == (CONTIGUOUS, "mean")
    assert "onlinequant" not in picture.meta
    probe.assert_settled(keep_output_layout)


def test_other_strides_are_left_alone() -> None:
    probe = GraphProbe(lambda x: (x * 2).transpose(2, 3), noise(1, 4, 8, 6)).analyze()
    assert probe.run(keep_output_layout) == {"keep_output_layout": 0}
    assert probe.after == probe.before
