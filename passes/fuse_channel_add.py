from __future__ import annotations

import operator

import torch
import torch.fx as fx

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils, info_of
from onlinequant_backend.graph.aliasing import Memory
from onlinequant_backend.torch_internals import dynamo_interface

from .context import PassContext

_ADDS = (operator.add, torch.add, torch.ops.aten.add.Tensor)


def fuse_channel_add(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Fuse the addition of one number per image and channel, a time embedding, into the preceding 8-bit convolution.

    Before::

        %conv = call_function[target=onlinequant.conv](args = (%x, ..., torch.float16))
        %add = call_function[target=operator.add](args = (%conv, %embedding))

    After, with an embedding of [N, C, 1, 1]::

        %flatten = call_function[target=aten.flatten](args = (%embedding, 1))
        %conv = call_function[target=onlinequant.conv](args = (%x, ..., torch.float16, None, %flatten))

    Does not change sums of another shape or dtype, in-place adds, and convolutions whose result has other readers,
    whose bias is written in place, or that run as a matrix product. Residuals are not fused either: the convolution's
    blocks would read them in their epilogue, and the following GroupNorm reads everything anyway (a convolution of SDXL
    took 116 us instead of 94 us).
    """
    if not context.has_kernel("channel_add"):
        return 0
    memory = Memory(graph_module)
    fused = 0
    for conv in list(graph_module.graph.nodes):
        add = next(iter(conv.users)) if conv.target is ops.conv and len(conv.users) == 1 else None
        if add is not None and len(conv.args) == 9 and _has_kernel(conv) and not _is_bias_written(conv, memory):
            fused += _fuse(graph_module, conv, add)
    return fused


def _is_bias_written(conv: fx.Node, memory: Memory) -> bool:
    bias = conv.args[4]
    return isinstance(bias, fx.Node) and memory.is_written(bias)


def _has_kernel(conv: fx.Node) -> bool:
    info = info_of(conv)
    return info is not None and info.geometry is not None and not info.geometry.is_pointwise(info.weight_shape)


def _fuse(graph_module: fx.GraphModule, conv: fx.Node, add: fx.Node) -> bool:
    if add.target not in _ADDS or len(add.args) != 2 or add.kwargs:
        return False
    other = add.args[1] if add.args[0] is conv else add.args[0]
    if not isinstance(other, fx.Node) or other is conv or not _fits(other, add, fx_utils.example(conv)):
        return False
    with graph_module.graph.inserting_before(add):
        row = graph_module.graph.call_function(torch.ops.aten.flatten.using_ints, (other, 1))
        new = graph_module.graph.call_function(ops.conv, (*conv.args, None, row))
    new.meta = {**conv.meta, "example_value": fx_utils.example(add)}
    add.replace_all_uses_with(new)
    graph_module.graph.erase_node(add)
    graph_module.graph.erase_node(conv)
    return True


def _fits(other: fx.Node, add: fx.Node, y: torch.Tensor) -> bool:
    value, total = (node.meta.get("example_value") for node in (other, add))
    if not isinstance(value, torch.Tensor) or not isinstance(total, torch.Tensor):
        return False
    sizes, expected = ([dynamo_interface.hint(size) for size in tensor.shape] for tensor in (value, y))
    return sizes == [*expected[:2], *[1] * (y.dim() - 2)] and value.dtype is total.dtype is y.dtype
