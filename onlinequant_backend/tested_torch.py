"""The releases of torch that this version of the package was tested with; docs/compatibility.md has the counts of
those other than the one in constraints.txt."""

from __future__ import annotations

import logging
import re

import torch

_log = logging.getLogger("onlinequant")

TESTED = ("2.11", "2.12", "2.13", "2.14", "2.15")


def standing(version: str) -> str:
    """How this torch relates to those that were tested: "tested", "newer than tested", "older than tested" or
    "untested"."""
    release = _release(version)
    tested = [_release(each) for each in TESTED]
    if release in tested:
        return "tested"
    if release > max(tested):
        return "newer than tested"
    return "older than tested" if release < min(tested) else "untested"


def describe(version: str) -> str:
    """One line for people: this version, how it relates to those that were tested, and these."""
    return f"torch {version} is {standing(version)}; tested: {', '.join(TESTED)}"


def announce() -> None:
    """Log it. It is no warning: ``parts`` finds what an untested torch lacks."""
    _log.info("%s", describe(torch.__version__))


def _release(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)
