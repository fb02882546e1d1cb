"""Fake tensor modes that do not keep code alive."""

from __future__ import annotations

import traceback

from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def new_fake_mode(shape_env: ShapeEnv) -> FakeTensorMode:
    """A fake tensor mode without the stack at which it was made.

    From Python 3.14 on, a summary of a stack references code objects, among them the one that Dynamo has compiled. That
    code references the compiled graph, which references the mode, and Python does not collect a cycle through a code
    object.
    """
    mode = FakeTensorMode(shape_env=shape_env)
    if hasattr(mode, "_stack_trace"):  # read only when two modes are mixed, to say where each was made
        mode._stack_trace = traceback.StackSummary()
    return mode
