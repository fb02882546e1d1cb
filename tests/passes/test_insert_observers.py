from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from onlinequant_backend.passes.insert_observers import insert_observers
from onlinequant_backend.quantization.observation import Observation, observe
from tests.helpers.graph_probe import GraphProbe
from tests.helpers.tiny import net, noise

X = noise(1, 4, 8, 8)


def test_every_candidate_is_observed_and_the_result_is_exact() -> None:
    model = net()
    probe = GraphProbe(model, X).analyze()
    assert probe.run(insert_observers) == {"insert_observers": 7}
    assert (probe.added(observe), probe.added("placeholder")) == (7, 1)
    assert probe.after.counts - probe.before.counts == {observe: 7, "placeholder": 1}

    layers = probe.new_layers()
    (result,) = probe.call(Observation(layers, probe.weights()))
    assert torch.equal(result, model(X))
    ranges = {info.name: layers[info.index].observed for info in probe.infos if info.index is not None}
    assert (ranges["conv_in"].minimum, ranges["conv_in"].maximum) == (float(X.min()), float(X.max()))
    assert all(observed.is_finite() for observed in ranges.values())
    probe.assert_settled(insert_observers)


def test_tensor_that_several_layers_read_has_one_range() -> None:
    probe = GraphProbe(net(), X).analyze()
    layers = probe.observe()
    observed = {
        info.name.rpartition(".")[2]: layers[info.index].observed for info in probe.infos if info.index is not None
    }
    assert observed["to_q"] is observed["to_k"] is observed["to_v"]
    assert len({id(value) for value in observed.values()}) == 5


def test_users_read_the_observer_even_the_output() -> None:
    probe = GraphProbe(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), noise(2, 4)).analyze()
    probe.run(insert_observers)
    first, second = probe.nodes(torch._C._nn.linear)
    first_observer, second_observer = probe.nodes(observe)
    assert list(first.users) == [first_observer]
    assert (second.args[0], second_observer.args[3]) == (first_observer, first_observer)
    assert probe.graph_module.graph.output_node().args == ((second_observer,),)


@pytest.mark.parametrize("options", [{"exclude": ("*.to_?",)}, {"quantized_conv_percentage": 0}])
def test_layers_that_options_refuse_are_observed_for_other_options(options: dict[str, Any]) -> None:
    probe = GraphProbe(net(), X, **options).analyze()
    assert len(probe.quantized()) == 4
    assert probe.run(insert_observers) == {"insert_observers": 7}


def test_layers_without_a_kernel_are_not_observed() -> None:
    probe = GraphProbe(nn.Conv1d(4, 4, 3), noise(1, 4, 8)).analyze()
    assert probe.run(insert_observers) == {"insert_observers": 0}
    assert (probe.added(observe), probe.added("placeholder")) == (0, 0)
