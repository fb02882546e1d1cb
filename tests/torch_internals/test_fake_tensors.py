"""What a fake tensor mode keeps alive."""

from __future__ import annotations

import gc
import weakref

from torch.fx.experimental.symbolic_shapes import ShapeEnv

from onlinequant_backend.torch_internals.fake_tensors import new_fake_mode


def test_no_stack_is_kept() -> None:
    """In Python 3.14 it would reference the code of all callers."""
    mode = new_fake_mode(ShapeEnv())
    assert not mode._stack_trace


def test_code_that_made_a_mode_is_not_kept() -> None:
    namespace = {"new_fake_mode": new_fake_mode, "ShapeEnv": ShapeEnv}
    code = compile("mode = new_fake_mode(ShapeEnv())", "<made>", "exec")
    exec(code, namespace)
    reference = weakref.ref(code)
    del code
    gc.collect()
    assert reference() is None
    assert namespace["mode"] is not None
