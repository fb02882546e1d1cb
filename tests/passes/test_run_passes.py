from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils
from onlinequant_backend.passes import ANALYZE, OBSERVE, REWRITE, SELECT, PassContext
from tests.helpers.graph_probe import GraphProbe, host_precision
from tests.helpers.tiny import net, noise, relative_error

X = noise(1, 4, 8, 8)


def negate(graph_module: fx.GraphModule, context: PassContext) -> int:
    """A pass that turns the result's sign."""
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    (result,) = output.args[0]
    with graph_module.graph.inserting_before(output):
        output.args = ((graph_module.graph.call_function(torch.neg, (result,)),),)
    return 1


def use_before_definition(graph_module: fx.GraphModule, context: PassContext) -> int:
    """A pass that breaks the graph."""
    first, *_, last = (node for node in graph_module.graph.nodes if node.op == "call_function")
    first.args = (last, *first.args[1:])
    return 1


def test_order_of_the_passes() -> None:
    assert [[run.__name__ for run in passes] for passes in (ANALYZE, OBSERVE, SELECT, REWRITE)] == [
        [
            *("functionalize", "attend_to_one_key", "scale_outputs", "share_activations"),
            *("name_layers", "annotate_density", "select_nodes", "find_attention"),
        ],
        ["insert_observers", "stream_weights"],
        ["select_nodes"],
        [
            "quantize_inputs",
            "rewrite_linear",
            "rewrite_conv",
            "rewrite_attention",
            "drop_identities",
            "fuse_group_norm",
            "fuse_layer_norm",
            "fuse_channel_add",
            "merge_linears",
            "fuse_geglu",
            "keep_views",
            "keep_output_layout",
            "drop_unused_inputs",
            "outline_regions",
        ],
    ]


def test_graph_is_recompiled_and_passes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Linear(4, 4)
    probe = GraphProbe(module, noise(2, 4))
    with caplog.at_level(logging.DEBUG, logger="onlinequant"):
        assert probe.run(negate) == {"negate": 1}
    assert "negate changed 1 nodes in " in caplog.text
    (result,) = probe.call()
    assert torch.equal(result, -module(noise(2, 4)))


def test_broken_graph_is_an_error() -> None:
    probe = GraphProbe(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), noise(2, 4))
    with pytest.raises(RuntimeError, match="before it has been defined"):
        probe.run(use_before_definition)


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "linears", "convs"),
    [
        ({}, 4, 3),
        ({"quantized_conv_percentage": 0}, 4, 0),
        ({"quantized_linear_percentage": 0}, 0, 3),
        ({"exclude": ("conv_*", "*.to_k")}, 3, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_net_in_8_bit_is_close_to_float(
    options: dict[str, Any], linears: int, convs: int, dtype: torch.dtype
) -> None:
    model = net(dtype=dtype)
    probe = GraphProbe(model, X.to(dtype), precision=host_precision(), **options).analyze()
    layers = probe.observe()
    changes = probe.run(*REWRITE)
    assert (changes["rewrite_linear"], changes["rewrite_conv"]) == (linears, convs)
    assert (probe.added(ops.linear), probe.added(ops.conv)) == (linears, convs)
    assert (probe.added(torch._C._nn.linear), probe.added(torch.conv2d)) == (-linears, -convs)
    assert changes["drop_unused_inputs"] == linears + convs
    # The caller hands over what is left of its arguments, then the extra inputs, in this order.
    names = [node.name for node in fx_utils.placeholders(probe.graph_module)]
    assert all(name in probe.inputs for name in names[: -len(probe.context.extra_inputs)])

    (result,) = probe.call_quantized(layers)
    expected = model(X.to(dtype))
    assert (result.dtype, result.stride()) == (dtype, expected.stride())
    assert 0 < relative_error(result, expected) < 0.05


def test_second_run_changes_nothing() -> None:
    probe = GraphProbe(net(), X).analyze()
    probe.run(*REWRITE)
    probe.assert_settled(*REWRITE)


def test_nothing_selected_changes_nothing() -> None:
    probe = GraphProbe(net(), X, exclude=("*",)).analyze()
    changes = probe.run(*REWRITE)
    del changes["keep_output_layout"]  # for which a call of ``contiguous`` says what a float graph does anyhow
    assert not any(changes.values())
    assert {info.reason for info in probe.infos} == {"excluded by '*'"}
