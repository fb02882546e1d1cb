"""What every product of 8-bit numbers is made of."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Operands(NamedTuple):
    """The first operands of the ops ``linear``, ``geglu`` and ``conv``.

    Attributes:
        xq: quantized activations: [..., inputs], or [N, C, *spatial] and channels last.
        qparams: theirs, see ``ops.quantize``.
        weight: [outputs, inputs] or [outputs, C, *kernel], or the handle that a packed weight is kept behind.
        weight_scale: float32, of the shape that ``Format.scale_of`` tells.
        bias: [outputs], or None.
    """

    xq: torch.Tensor
    qparams: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
