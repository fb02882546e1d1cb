"""Announces how calls run from now on."""

from __future__ import annotations

import logging

from ..progress import tell
from ..report.report import Report

_log = logging.getLogger("onlinequant")


def announce(report: Report, in_log: bool = True) -> None:
    """Send the report's summary to the listener and the log."""
    summary = report.summary()
    if in_log:
        _log.info("%s", summary)
    tell(summary)
