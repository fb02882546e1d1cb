from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from onlinequant_backend.passes.drop_identities import drop_identities
from tests.helpers.graph_probe import GraphProbe
from tests.helpers.tiny import noise

X = noise(2, 8)


@pytest.mark.parametrize(
    "identity",
    [
        lambda x: x / 1.0,
        lambda x: x / 1,
        lambda x: torch.div(x, 1.0),
        lambda x: F.dropout(x, 0.0, True),
        lambda x: F.dropout(x, 0.5, training=False),
    ],
)
def test_what_changes_nothing_goes(identity: Callable[[torch.Tensor], torch.Tensor]) -> None:
    probe = GraphProbe(lambda x: identity(x + 1) * 2, X)
    assert probe.run(drop_identities) == {"drop_identities": 1}
    assert sum(probe.after.counts.values()) == sum(probe.before.counts.values()) - 1
    (result,) = probe.call()
    assert torch.equal(result, (X + 1) * 2)
    probe.assert_settled(drop_identities)


def written_before(x: torch.Tensor) -> torch.Tensor:
    x[:, :4].mul_(3)
    return x / 1.0


def input_written_after(x: torch.Tensor) -> torch.Tensor:
    y = x / 1.0
    x.detach().add_(1)
    return x * y


def result_written_after(x: torch.Tensor) -> torch.Tensor:
    y = F.dropout(x / 1.0, training=False)
    y.chunk(2, -1)[0].add_(1)
    return x * y


@pytest.mark.parametrize(
    "function",
    [
        written_before,
        input_written_after,
        result_written_after,
        lambda x: (x / 1.0)[0],
        lambda x: (x, x / 1.0),
        lambda x: 1.0 / x,
        lambda x: x / x,
        lambda x: (x > 0).to(torch.int64) / 1.0,
        lambda x: F.dropout(x, 0.5, True),
        lambda x: F.dropout(x + 0, 0.5, False, True),
    ],
)
def test_what_changes_something_stays(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    probe = GraphProbe(lambda x: function(x * 2), X)
    assert probe.run(drop_identities) == {"drop_identities": 0}
