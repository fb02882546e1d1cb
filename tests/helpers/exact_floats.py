"""Floats in Triton's interpreter as GPUs treat them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

_DTYPES = {"fp8e4nv": torch.float8_e4m3fn, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def _convert(values: np.ndarray[Any, Any], source: Any, target: Any, _rounding: object) -> np.ndarray[Any, Any]:
    """``values``, or their bits, of Triton's type ``source``: the bits of the nearest of type ``target``."""
    result = _as_torch(values, source)
    if target.name == "fp8e4nv":  # as on a GPU, where the conversion saturates
        result = torch.where(result.abs() < torch.inf, result.clamp(-448, 448), torch.nan)
    bits = result.to(_DTYPES[target.name]).view(_BITS[target.primitive_bitwidth])
    return bits.numpy().view(f"uint{target.primitive_bitwidth}")


def _as_torch(values: np.ndarray[Any, Any], dtype: Any) -> torch.Tensor:
    bits = torch.frombuffer(bytearray(values.tobytes()), dtype=_BITS[dtype.primitive_bitwidth])
    return bits.view(_DTYPES[dtype.name]).float().view(values.shape)


def _dot(_builder: object, a: Any, b: Any, d: Any, _precision: object, _max_imprecise: object) -> Any:
    from triton.runtime.interpreter import TensorHandle

    def numbers(factor: Any) -> np.ndarray[Any, Any]:
        return factor.data if factor.dtype.is_int() else _as_torch(factor.data, factor.dtype).numpy()

    return TensorHandle(np.matmul(numbers(a), numbers(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, conversions are exact, and so are products of bfloat16.

    Triton 3.8's own conversions lose the carry where rounding up reaches a power of two, have no NaN in fp8, and cut
    bfloat16 off; its products take the bits of bfloat16 for numbers."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", _convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
