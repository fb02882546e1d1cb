"""One layer of one graph, and what became of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .schema import NUMBER, OPTIONAL_NUMBER, Types, checked, finite

if TYPE_CHECKING:
    from ..graph import AttentionInfo, LayerInfo

KINDS = ("conv", "linear", "attention")


@dataclasses.dataclass(frozen=True)
class NodeDecision:
    """One layer of one graph, and what became of it; raises ValueError for an unknown kind or an empty reason.

    Attributes:
        name: fully qualified name of the layer in its model.
        kind: "conv", "linear" or "attention".
        shape: shape of the layer's input, of attention that of its queries.
        weight_shape: shape of its weight, of attention that of its keys.
        flops: floating-point operations of one call.
        bytes: input, weight and output, each moved once.
        density: ``flops / bytes``.
        sensitivity: the error that 8 bit causes, relative to the float output; see ``Report.sensitivity_kind``; None if
            not measured.
        mae: mean absolute error in 8 bit, in the output's units; None if not measured.
        mse: mean squared error in 8 bit; None if not measured.
        float_us, quantized_us: microseconds of one call in float and in 8 bit, alone; None if not measured.
        quantized: whether the layer runs in 8 bit.
        reason: why; never empty.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    flops: int
    bytes: int
    density: float
    sensitivity: float | None
    mae: float | None
    mse: float | None
    quantized: bool
    reason: str
    float_us: float | None = None
    quantized_us: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name} is of kind {self.kind!r}, which is none of {KINDS}")
        if not self.reason:
            raise ValueError(f"the decision about {self.name} has no reason")

    @classmethod
    def of(cls, info: LayerInfo | AttentionInfo) -> NodeDecision:
        """What has been decided about a layer."""
        sensitivity = info.sensitivity
        return cls(
            name=info.name,
            kind=info.kind,
            shape=info.input_shape,
            weight_shape=info.weight_shape,
            flops=info.flops,
            bytes=info.bytes,
            density=info.density,
            sensitivity=sensitivity.relative if sensitivity else None,
            mae=sensitivity.mae if sensitivity else None,
            mse=sensitivity.mse if sensitivity else None,
            float_us=info.float_us,
            quantized_us=info.quantized_us,
            quantized=info.quantized,
            reason=info.reason,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data. ``density`` is called ``compute_density``, as in the predecessor's file."""
        values = {name: finite(value) for name, value in dataclasses.asdict(self).items()}
        return {_JSON_NAMES.get(name, name): list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> NodeDecision:
        """The reverse of ``to_dict``; raises ValueError naming ``where`` and what is wrong."""
        values = checked(data, DECISION_TYPES, where)
        values["density"] = values.pop("compute_density")
        for name in ("shape", "weight_shape"):
            if not all(type(size) is int for size in values[name]):
                raise ValueError(f"{name} of {where} holds something that is not an integer")
            values[name] = tuple(values[name])
        return cls(**values)


# The names that differ in JSON, and the types of a saved decision.
_JSON_NAMES = {"density": "compute_density"}
DECISION_TYPES: Types = {
    "name": str,
    "kind": str,
    "shape": list,
    "weight_shape": list,
    "flops": int,
    "bytes": int,
    "compute_density": NUMBER,
    "sensitivity": OPTIONAL_NUMBER,
    "mae": OPTIONAL_NUMBER,
    "mse": OPTIONAL_NUMBER,
    "float_us": OPTIONAL_NUMBER,
    "quantized_us": OPTIONAL_NUMBER,
    "quantized": bool,
    "reason": str,
}
