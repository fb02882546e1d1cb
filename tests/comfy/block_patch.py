"""A custom node for the server: what FreeU does, which knows only widths that the small models do not have."""

from __future__ import annotations

from typing import Any, ClassVar


class ScaleOutputBlocks:
    """Scales what comes into each output block."""

    INPUT_TYPES: ClassVar = classmethod(lambda _: {"required": {"model": ("MODEL",), "by": ("FLOAT", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "test"

    def patch(self, model: Any, by: float) -> tuple[Any]:
        clone = model.clone()
        clone.set_model_output_block_patch(lambda h, skipped, _options: (h * by, skipped))
        return (clone,)


NODE_CLASS_MAPPINGS = {"ScaleOutputBlocks": ScaleOutputBlocks}
