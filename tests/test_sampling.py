"""Observing for a whole sampling run, whose length only the caller knows."""

from __future__ import annotations

import pytest
import torch

import onlinequant_backend as oq
from onlinequant_backend import compat
from onlinequant_backend.progress import told_to
from onlinequant_backend.sampling import current_step, sampling_step
from tests.small import X, compiled, small


def test_the_block_says_which_step_it_is() -> None:
    assert current_step(3, 20) == (3, 20)
    with sampling_step(lambda: (5, 7)):
        assert current_step(3, 20) == (5, 7)
        with sampling_step(lambda: (1, 2)):
            assert current_step(3, 20) == (1, 2)
        assert current_step(3, 20) == (5, 7)
    assert current_step(3, 20) == (3, 20)


@torch.no_grad()
def test_a_run_is_observed_to_its_end_then_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "compile_fx", lambda graph, inputs, options, outside_dynamo: graph)
    model = small()
    step, expected, told, asked = compiled(model), model(X), list[str](), list[int]()

    def call(number: int) -> torch.Tensor:
        def position() -> tuple[int, int]:
            asked.append(number)
            return number, 3

        with told_to(told.append), sampling_step(position):
            return step(X)

    # Two calls a step, and more than the two that the options ask for; an interrupted run does not count.
    for number in (1, 1, 2, 1, 1, 2, 2, 3):
        assert torch.equal(call(number), expected)
        assert oq.reports()[-1].phase == "calibrating"
    assert told[-1].startswith("observing 3 of 3 (")
    assert not torch.equal(call(3), expected)
    assert told[-1] == oq.reports()[-1].summary() == "Small: quantized: 3 of 3 layers in int8"
    assert asked == [1, 1, 2, 1, 1, 2, 2, 3]  # not any more when there is nothing to observe
