"""Shapes and dtypes that every kernel of a linear layer or a convolution is tested with."""

from __future__ import annotations

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding of the result, and for float32 that of a few factors.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}

CONVS = [
    # input, weight, stride, padding, dilation
    pytest.param((1, 16, 8, 8), (32, 16, 3, 3), 1, 1, 1, id="3x3"),
    pytest.param((2, 24, 8, 8), (8, 24, 1, 1), 1, 0, 1, id="1x1"),
    pytest.param((2, 7, 9, 5), (13, 7, 3, 3), 2, 1, 1, id="odd channels with stride"),
    pytest.param((3, 4, 8, 9), (5, 4, 3, 3), 1, 2, 2, id="dilation"),
    pytest.param((1, 3, 9, 9), (4, 3, 4, 2), (2, 1), (1, 0), (1, 2), id="lopsided"),
    pytest.param((1, 1, 6, 6), (1, 1, 5, 5), 1, 2, 1, id="one channel"),
    pytest.param((1, 320, 4, 4), (4, 320, 3, 3), 1, 1, 1, id="conv_out"),
    pytest.param((2, 16, 1, 1), (8, 16, 3, 3), 1, 1, 1, id="one pixel"),
    pytest.param((2, 8, 5, 4, 3), (6, 8, 3, 1, 1), 1, (1, 0, 0), 1, id="over time"),
    pytest.param((1, 5, 4, 6, 6), (7, 5, 3, 3, 3), (1, 2, 2), 1, 1, id="3x3x3"),
]
LINEARS = [
    # input, output features
    pytest.param((64, 64), 64, id="even"),
    pytest.param((1, 7), 3, id="tiny"),
    pytest.param((33,), 9, id="vector"),
    pytest.param((2, 77, 40), 24, id="batch of rows"),
    pytest.param((2, 3, 5, 33), 17, id="odd"),
    pytest.param((257, 320), 1, id="one output"),
]
