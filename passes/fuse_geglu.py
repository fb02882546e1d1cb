from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils, info_of
from onlinequant_backend.graph.aliasing import Memory

from .context import PassContext


def fuse_geglu(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Fuse GEGLU, and the quantization for the next layer, into the 8-bit linear whose result is split in two.

    Before::

        %linear = call_function[target=onlinequant.linear](args = (%x, %qparams_0, %weight, %scale, %b, torch.float16))
        %chunk = call_method[target=chunk](args = (%linear, 2), kwargs = {dim: -1})
        %value = call_function[target=operator.getitem](args = (%chunk, 0))
        %gate = call_function[target=operator.getitem](args = (%chunk, 1))
        %gelu = call_function[target=torch._C._nn.gelu](args = (%gate,))
        %mul = call_function[target=operator.mul](args = (%value, %gelu))
        %quantize = call_function[target=onlinequant.quantize](args = (%mul, %qparams_1, torch.float8_e4m3fn, False))

    After::

        %quantize = call_function[target=onlinequant.geglu](
            args = (%x, %qparams_0, %weight, %scale, %b, %qparams_1, torch.float8_e4m3fn))

    The wide result is not written to memory. If ``%mul`` has readers besides the quantize node, the fused op returns it
    instead. Does not change other patterns: the tanh approximation, more readers of a part, a bias that is written in
    place, formats without a fused kernel.
    """
    if not context.has_kernel("geglu"):
        return 0
    memory = Memory(graph_module)
    fused = 0
    for linear in list(graph_module.graph.nodes):
        result = _product(linear) if linear.target is ops.linear and info_of(linear) is not None else None
        if result is None or not _has_kernel(linear, context):
            continue
        x, qparams, weight, scale, bias, dtype = linear.args
        if isinstance(bias, fx.Node) and memory.is_written(bias):  # the fused op would read it later
            continue
        quantize = _only_user(result)
        if quantize is not None and quantize.target is ops.quantize and not quantize.args[3]:
            result, out_qparams, dtype = quantize, quantize.args[1], quantize.args[2]
        else:
            out_qparams = None
        with graph_module.graph.inserting_before(result):
            geglu = graph_module.graph.call_function(ops.geglu, (x, qparams, weight, scale, bias, out_qparams, dtype))
        geglu.meta = dict(result.meta)
        result.replace_all_uses_with(geglu)
        _erase_back_to(graph_module, result, x)
        fused += 1
    return fused


def _has_kernel(linear: fx.Node, context: PassContext) -> bool:
    info = info_of(linear)
    assert info is not None
    return context.has_kernel("geglu", info.weight_shape)


def _product(linear: fx.Node) -> fx.Node | None:
    """The product of one half of ``linear`` with GELU of the other, if ``linear`` has no other use."""
    chunk = _only_user(linear)
    if chunk is None or not _is_halving(chunk) or len(chunk.users) != 2:
        return None
    halves = {user.args[1]: user for user in chunk.users if user.target is operator.getitem}
    value, gate = halves.get(0), halves.get(1)
    gelu = None if gate is None else _only_user(gate)
    if (
        gelu is None
        or gelu.target is not torch.nn.functional.gelu
        or fx_utils.argument(gelu, 1, "approximate", "none") != "none"
    ):
        return None
    product = _only_user(gelu)
    if product is None or product.target not in (operator.mul, operator.imul, torch.mul) or product.kwargs:
        return None
    return product if set(product.args) == {value, gelu} and value is not None and len(value.users) == 1 else None


def _is_halving(node: fx.Node) -> bool:
    if node.target not in ("chunk", torch.chunk) or fx_utils.argument(node, 1, "chunks") != 2:
        return False
    last = fx_utils.example(node.all_input_nodes[0]).dim() - 1
    return fx_utils.argument(node, 2, "dim", 0) in (-1, last)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _erase_back_to(graph_module: fx.GraphModule, node: Any, stop: Any) -> None:
    """Erase ``node`` and its producers without readers, back to ``stop``."""
    if not isinstance(node, fx.Node) or node is stop or node.users or node.op == "placeholder":
        return
    read = node.all_input_nodes
    graph_module.graph.erase_node(node)
    for before in read:
        _erase_back_to(graph_module, before, stop)
