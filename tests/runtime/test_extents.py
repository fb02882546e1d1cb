"""Which inputs are far from those before."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

from onlinequant_backend.runtime.extents import Extents
from tests.helpers.tiny import noise


@pytest.fixture(params=["on a CPU", "as on a GPU"])
def extents(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Extents:
    if request.param == "as on a GPU":
        pytest.importorskip("triton", reason="there is no triton: pip install --no-deps triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET=1 is not set")
        monkeypatch.setattr(Extents, "are_late", lambda _, device: True)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return Extents([0, 2])


def test_only_inputs_far_from_those_before_have_changed(extents: Extents) -> None:
    weight, text = noise(4), noise(4).half()

    def have_changed(*args: object) -> bool:
        return extents.begin(args, weight.device)()

    calls = [(1, True), (1.2, False), (0.2, False), (2, True), (2, False), (torch.inf, False), (torch.nan, False)]
    assert [have_changed(factor * noise(9), 9 * weight, text) for factor, _ in calls] == [grown for _, grown in calls]
    assert have_changed(noise(9), weight, 2 * text)
    assert not have_changed(0 * noise(9), weight, text)
    assert have_changed(0.01 * noise(9), weight, text)
    assert not have_changed(0.01 * noise(9), weight, text)
    assert not have_changed(3, weight, torch.ones(0))


def test_inputs_that_cannot_be_looked_at_are_not_looked_at(
    extents: Extents, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not extents.are_late(torch.device("cpu")):
        pytest.skip("there, nothing can go wrong")
    from onlinequant_backend.kernels.nvidia import bounds_check

    monkeypatch.setattr(bounds_check, "_check_kernel", None)
    for _ in range(2):
        assert not extents.begin((noise(9), None, 3), torch.device("cpu"))()
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "the inputs of a step cannot be compared with those before" in record.message
