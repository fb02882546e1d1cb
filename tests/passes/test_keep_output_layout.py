from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from onlinequant_backend.passes import REWRITE
from onlinequant_backend.passes.keep_output_layout import keep_output_layout
from tests.helpers.graph_probe import GraphProbe, host_precision
from tests.helpers.tiny import noise

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


class Patches(nn.Module):
    """The tokens of a vision transformer: a view of a convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("batch", [1, 2])
def test_views_of_pictures_keep_theirs(batch: int) -> None:
    model, x = Patches(), noise(batch, 4, 16, 16)
    probe = GraphProbe(model, x, precision=host_precision()).analyze()
    layers = probe.observe()
    assert probe.run(*REWRITE)["keep_output_layout"] == 1
    (result,) = probe.call_quantized(layers)
    assert result.stride() == model(x).stride()
    probe.assert_settled(keep_output_layout)


def test_what_has_no_layout_is_left_alone() -> None:
    probe = GraphProbe(Twice(nn.Conv2d(4, 8, 3)), noise(1, 4, 8, 8)).analyze()
    assert probe.run(keep_output_layout) == {"keep_output_layout": 1}
    picture, numbers = probe.graph_module.graph.output_node().args[0]
    assert (picture.target, numbers.target) == (CONTIGUOUS, "mean")
    assert "onlinequant" not in picture.meta
    probe.assert_settled(keep_output_layout)


@pytest.mark.parametrize("view", [lambda x: x[..., ::2], lambda x: x.expand(3, 4, 8, 6)], ids=["gaps", "shared values"])
def test_other_strides_are_left_alone(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    probe = GraphProbe(lambda x: view(x * 2), noise(1, 4, 8, 6)).analyze()
    assert probe.run(keep_output_layout) == {"keep_output_layout": 0}
    assert probe.after == probe.before
