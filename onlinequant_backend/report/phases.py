"""The phases of a compiled graph, and which may follow which."""

from __future__ import annotations

import enum
from collections.abc import Mapping


class Phase(enum.Enum):
    """What the calls of one graph run at present.

    Attributes:
        OBSERVING: float; ranges of activations are observed.
        LOADING: float in other threads; a compiled graph is loaded from the cache.
        COMPILING: float in other threads; Inductor compiles.
        QUANTIZED: the 8-bit graph.
        FLOAT: float, for a reason that belongs to this call, its size or its weights: another call may run in 8 bit.
        FAILED: float, whatever the call, until it is tried again.
        RETRYING: what has failed is tried again.
        LOST: float for good: the process was forked while it compiled.
    """

    OBSERVING = enum.auto()
    LOADING = enum.auto()
    COMPILING = enum.auto()
    QUANTIZED = enum.auto()
    FLOAT = enum.auto()
    FAILED = enum.auto()
    RETRYING = enum.auto()
    LOST = enum.auto()


# Calls of other weights, sizes and threads share a graph, so a running graph may change from any phase to any other. A
# graph that has failed runs nothing but float until it is tried again, and a lost one for good: what a call that began
# earlier has to say in another thread does not count then.
_RUNNING = frozenset({Phase.OBSERVING, Phase.LOADING, Phase.COMPILING, Phase.QUANTIZED, Phase.FLOAT})
_ENDED = frozenset({Phase.FAILED, Phase.LOST})
TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.OBSERVING: _RUNNING | _ENDED,
    Phase.LOADING: _RUNNING | _ENDED,
    Phase.COMPILING: _RUNNING | _ENDED,
    Phase.QUANTIZED: _RUNNING | _ENDED,
    Phase.FLOAT: _RUNNING | _ENDED,
    Phase.FAILED: frozenset({Phase.FAILED, Phase.RETRYING, Phase.LOST}),
    Phase.RETRYING: _RUNNING | _ENDED,
    Phase.LOST: frozenset(),
}

# What ``Report.phase`` and the JSON file say; their schema knows these four words.
SHOWN: Mapping[Phase, str] = {
    Phase.OBSERVING: "calibrating",
    Phase.LOADING: "compiling",
    Phase.COMPILING: "compiling",
    Phase.QUANTIZED: "quantized",
    Phase.FLOAT: "float",
    Phase.FAILED: "float",
    Phase.RETRYING: "float",
    Phase.LOST: "float",
}
