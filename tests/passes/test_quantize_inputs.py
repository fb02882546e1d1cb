from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils
from onlinequant_backend.passes import REWRITE
from onlinequant_backend.passes.quantize_inputs import quantize_inputs
from tests.helpers.graph_probe import GraphProbe, WithWeight, host_precision
from tests.helpers.tiny import net, noise, relative_error

LINEAR = torch._C._nn.linear


class Readers(nn.Module):
    """A convolution and two linears that all read the graph's input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.conv(x) + self.second(x)


def test_q_k_and_v_share_one_quantize_node() -> None:
    probe = GraphProbe(net(), noise(1, 4, 8, 8)).analyze()
    # conv_in, the block's conv, one for q, k and v, to_out, conv_out.
    assert probe.run(quantize_inputs) == {"quantize_inputs": 5}
    assert probe.after.counts - probe.before.counts == {ops.quantize: 5, "placeholder": 5}
    q, k, v, to_out = probe.nodes(LINEAR)
    assert q.args[0] is k.args[0] is v.args[0] is not to_out.args[0]

    indices = {info.name: info.index for info in probe.infos}
    first_readers = ["conv_in", "blocks.0.conv", "blocks.0.to_q", "blocks.0.to_out", "conv_out"]
    assert probe.context.extra_inputs == [("qparams", indices[name]) for name in first_readers]
    assert [node.name for node in fx_utils.placeholders(probe.graph_module)[-5:]] == [
        f"onlinequant_qparams_{indices[name]}" for name in first_readers
    ]
    probe.assert_settled(quantize_inputs)


def test_convolution_and_linear_that_read_one_tensor_do_not_share() -> None:
    probe = GraphProbe(Readers(), noise(1, 4, 8, 8)).analyze()
    assert probe.run(quantize_inputs) == {"quantize_inputs": 2}
    rows, image = probe.nodes(ops.quantize)
    assert str(rows.args) == "(l_x_, onlinequant_qparams_0, torch.uint8, False, True)"
    assert str(image.args) == "(l_x_, onlinequant_qparams_1, torch.uint8, True, True)"
    assert [node.args[0] for node in probe.nodes(LINEAR)] == [rows, rows]
    assert probe.nodes(torch.conv2d)[0].args[0] is image


def test_arguments_given_by_keyword_are_found() -> None:
    module = WithWeight(lambda x, w: F.linear(bias=None, weight=w, input=x), 8, 8)
    probe = GraphProbe(module, noise(2, 8)).analyze()
    assert probe.run(quantize_inputs) == {"quantize_inputs": 1}
    assert probe.nodes(LINEAR)[0].kwargs["input"] is probe.nodes(ops.quantize)[0]


@pytest.mark.parametrize(
    ("exclude", "selection", "quantized"),
    [
        (("conv",), None, ["first", "second"]),
        ((), [1], ["conv"]),
        ((), [0, 2], ["first", "second"]),
        (("*",), None, []),
    ],
)
def test_only_selected_layers_read_8_bit(
    exclude: tuple[str, ...], selection: list[int] | None, quantized: list[str]
) -> None:
    probe = GraphProbe(Readers(), noise(1, 4, 8, 8), exclude=exclude).analyze()
    probe.context.selection = selection
    assert probe.run(quantize_inputs) == {"quantize_inputs": 1 if quantized else 0}
    readers = {user for node in probe.nodes(ops.quantize) for user in node.users}
    assert [node.meta["onlinequant"].name for node in probe.graph_module.graph.nodes if node in readers] == quantized
    if not quantized:
        assert probe.after == probe.before
        assert {info.reason for info in probe.infos} == {"excluded by '*'"}


@torch.no_grad()
def test_an_input_that_is_the_bias_as_well() -> None:
    module, x = WithWeight(lambda x, w: F.linear(x, w, x), 32, 32), noise(32)
    probe = GraphProbe(module, x, precision=host_precision()).analyze()
    layers = probe.observe()
    probe.run(*REWRITE)
    (result,) = probe.call_quantized(layers)
    assert 0 < relative_error(result, module(x)) < 0.05


def add_in_place(x: torch.Tensor) -> torch.Tensor:
    x.add_(100)
    return x


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        add_in_place,
        lambda x: x.add_(100),
        lambda x: x + 100,
    ],
)
def test_value_that_changes_between_two_readers_is_not_shared(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            return self.first(x) + self.second(change(x))

    torch.manual_seed(0)
    module, x = Changing(), noise(64, 32)
    probe = GraphProbe(module, x, precision=host_precision()).analyze()
    layers = probe.observe()
    probe.run(*REWRITE)
    (result,) = probe.call_quantized(layers)
    assert relative_error(result, module(x)) < 0.05


@torch.no_grad()
def test_an_input_with_large_channels_is_smoothed_for_the_readers_of_equal_factors() -> None:
    x = noise(64, 32)
    x[:, 5] *= 100

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) + self.second(x)

    torch.manual_seed(0)
    module = Both()
    for layer in (module.first, module.second):
        layer.weight[:, 5] /= 100
    for shared in (True, False):
        probe = GraphProbe(module, x, precision=host_precision()).analyze()
        layers = probe.observe()
        assert layers[0].smoothing is not None and layers[0].smoothing is layers[1].smoothing
        if not shared:
            layers[1].smoothing = layers[0].smoothing / 2
            probe.context.smoothing = {0: b"first", 1: b"second"}
        probe.run(*REWRITE)
        assert sum(what == "smoothing" for what, _ in probe.context.extra_inputs) == (1 if shared else 2)
        if shared:
            (result,) = probe.call_quantized(layers)
            assert relative_error(result, module(x)) < 0.05
