from __future__ import annotations

import logging

import pytest

from onlinequant_backend import best_effort


def test_each_kind_of_trouble_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        best_effort.warn_once("read", "cannot read %s", "this")
        best_effort.warn_once("write", "cannot write %s", "that")
    assert [record.getMessage() for record in caplog.records] == ["cannot read this", "cannot write that"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_who_wants_to_know_is_told_each_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "onlinequant"):
        for _ in range(3):
            best_effort.warn_once("read", "cannot read")
    assert len(caplog.records) == 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "cannot write there: [Errno 28] No space left on device. Going on"),
        (RecursionError(), "cannot write there: RecursionError. Going on without it."),
        (ValueError("It is wrong."), "cannot write there: It is wrong. Going on without it."),
    ],
)
def test_an_error_ends_the_block_only(caplog: pytest.LogCaptureFixture, error: Exception, message: str) -> None:
    with best_effort.best_effort("cannot write %s", "there"):
        raise error
    assert message in caplog.text


def test_an_interruption_is_not_held_back() -> None:
    with pytest.raises(KeyboardInterrupt), best_effort.best_effort("cannot write"):
        raise KeyboardInterrupt


def test_one_kind_of_error_is_one_kind_of_trouble(caplog: pytest.LogCaptureFixture) -> None:
    for number in (28, 28, 30):
        for message in ("cannot write", "cannot lock"):
            with best_effort.best_effort(message):
                raise OSError(number, "trouble")
    assert [record.getMessage()[:12] for record in caplog.records] == ["cannot write", "cannot write"]
