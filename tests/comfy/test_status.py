"""What the nodes say, without ComfyUI."""

from __future__ import annotations

import pytest

from onlinequant_backend.comfy_integration.presets import PRESETS
from onlinequant_backend.comfy_integration.status import STALE, Statuses
from onlinequant_backend.config import QuantConfig
from onlinequant_backend.progress import Update

KIND = "OnlineQuantModel"


@pytest.fixture
def sent() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def statuses(sent: list[tuple[str, str]]) -> Statuses:
    return Statuses(lambda text, node: sent.append((node, text)))


def test_obsolete_settings_are_silent(statuses: Statuses, sent: list[tuple[str, str]]) -> None:
    old = statuses.listener("4", KIND, {"precision": "int8"})
    old(Update("observing 1 of 20"))
    new = statuses.listener("4", KIND, {"precision": "fp8"})
    old(Update("quantized: 7 of 118 layers in int8"))
    new(Update("observing 1 of 20"))
    assert sent == [("4", "observing 1 of 20"), ("4", STALE), ("4", "observing 1 of 20")]
    (shown,) = statuses.shown()
    assert shown == {"node": "4", "type": KIND, "settings": {"precision": "fp8"}, "text": "observing 1 of 20"}


def test_the_same_settings_go_on_after_the_node_was_executed_again(
    statuses: Statuses, sent: list[tuple[str, str]]
) -> None:
    model = object()
    first, second = (statuses.listener("4", KIND, {"precision": "int8"}, model) for _ in range(2))
    first(Update("compiling"))
    second(Update("quantized"))
    assert sent == [("4", "compiling"), ("4", "quantized")]


def test_another_model_is_another_matter(statuses: Statuses, sent: list[tuple[str, str]]) -> None:
    models = [object(), object()]
    old, new = (statuses.listener("4", KIND, {}, model) for model in models)
    old(Update("of the old model"))
    new(Update("of the new model"))
    assert sent == [("4", STALE), ("4", "of the new model")]


def test_nodes_do_not_disturb_each_other(statuses: Statuses, sent: list[tuple[str, str]]) -> None:
    for node in ("4", "5"):
        statuses.listener(node, KIND, {"node": node})(Update(f"of {node}"))
    assert sent == [("4", "of 4"), ("5", "of 5")]
    assert [each["text"] for each in statuses.shown()] == ["of 4", "of 5"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_of_options_that_there_are(name: str) -> None:
    thresholds = {"conv_compute_density_threshold": None, "linear_compute_density_threshold": None}
    QuantConfig.from_options({**PRESETS[name], **thresholds, "exclude": ()})
    assert PRESETS[name].keys() == PRESETS["fast"].keys()
