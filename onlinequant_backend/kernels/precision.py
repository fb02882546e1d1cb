"""Which 8-bit precision a device is fast at, and why."""

from __future__ import annotations

import dataclasses

import torch

from .. import errors
from . import formats
from .formats import Format
from .provider import providers_for, why_none


@dataclasses.dataclass(frozen=True)
class Precision:
    """What layers on a device are computed in.

    Attributes:
        name: "int8", "fp8" or "float".
        reason: why this one; never empty.
        format: how 8-bit numbers are stored.
    """

    name: str
    reason: str
    format: Format = formats.ONEDNN


def resolve(requested: str, device: torch.device) -> Precision:
    """The precision to use on ``device``; raises PrecisionUnavailableError for one asked for by name but not there."""
    if requested == "float":
        return Precision("float", 'precision="float" was asked for')
    if requested == "auto":
        return _automatic(device)
    answers = [provider.format(requested, device) for provider in providers_for(device)] or [why_none(device)]
    for answer in answers:
        if isinstance(answer, Format):
            return Precision(requested, f'precision="{requested}" was asked for', answer)
    raise errors.PrecisionUnavailableError(
        f"precision={requested!r} has no kernels here: {answers[0]}. "
        'precision="auto" takes what this device is fast at, and float where there is nothing.'
    )


def _automatic(device: torch.device) -> Precision:
    here = providers_for(device)
    name, reason = here[0].fastest(device) if here else ("float", why_none(device))
    format = here[0].format(name, device) if name != "float" else None
    return Precision(name, reason, format) if isinstance(format, Format) else Precision("float", reason)
