"""The JSON of saved reports: which type each value has, checked when a file is read.

Own code: pydantic needs no tables of types, but is a compiled dependency, takes 0.08 s of each start, reads numbers
that are too large as infinite, and gives messages of several lines that would have to be rewritten.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

NUMBER, OPTIONAL_NUMBER = (int, float), (int, float, type(None))
Types = Mapping[str, type | tuple[type, ...]]


def checked(data: Any, types: Types, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is not a JSON object")
    for name, expected in types.items():
        if name not in data:
            raise ValueError(f"{where} has no {name!r}")
        # In Python a bool is an int; in a statistics file it is not.
        if not isinstance(data[name], expected) or (isinstance(data[name], bool) and expected is not bool):
            raise ValueError(f"{name!r} of {where} is {data[name]!r}")
        # JSON's integers have no limit; a float has.
        if expected in (NUMBER, OPTIONAL_NUMBER) and abs(data[name] or 0) > sys.float_info.max:
            raise ValueError(f"{name!r} of {where} is too large")
    return {name: data[name] for name in types}


def finite(value: Any) -> Any:
    """``value``, or None for a float that JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
