from __future__ import annotations

import operator

import torch.fx as fx

from onlinequant_backend import ops
from onlinequant_backend.graph import fx_utils, layer_reads

from .context import PassContext, is_selected


def quantize_inputs(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Insert one quantize node for every tensor that 8-bit layers read, shared by all its readers (q, k and v).

    Before::

        %q = call_function[target=torch._C._nn.linear](args = (%x, %wq))
        %k = call_function[target=torch._C._nn.linear](args = (%x, %wk))

    After::

        %quantize = call_function[target=onlinequant.quantize](
            args = (%x, %onlinequant_qparams_0, torch.uint8, False, True))
        %q = call_function[target=torch._C._nn.linear](args = (%quantize, %wq))
        %k = call_function[target=torch._C._nn.linear](args = (%quantize, %wk))

    A layer with a smoothed input reads ``%x * %onlinequant_smoothing_0``, quantized, and shares it with layers of equal
    factors. ``rewrite_linear`` and ``rewrite_conv`` must then rewrite the layers; until then the graph is not valid.
    Convolutions read channels last and linears read rows, so these never share a node; nor do readers on different
    sides of an in-place write, which may change the tensor. Does not change float layers.
    """
    shared: dict[tuple[fx.Node, int, bool, object], fx.Node] = {}
    for node, info, (x, writes) in layer_reads(graph_module):
        if info.index is None or not is_selected(info, context) or _is_quantize(x):
            continue
        key = (x, writes, info.kind == "conv", context.smoothing.get(info.index))
        if key not in shared:
            qparams = _extra_input(graph_module, "qparams", info.index, context)
            source = x
            if info.index in context.smoothing:
                factors = _extra_input(graph_module, "smoothing", info.index, context)
                with graph_module.graph.inserting_before(node):
                    source = graph_module.graph.call_function(operator.mul, (x, factors))
            with graph_module.graph.inserting_before(node):
                dtype = context.precision.format.activation
                args = (source, qparams, dtype, info.kind == "conv", not context.saturates)
                shared[key] = graph_module.graph.call_function(ops.quantize, args)
        if node.args:  # not all uses of the tensor, which may also be the bias
            node.update_arg(0, shared[key])
        else:
            node.update_kwarg("input", shared[key])
    return len(shared)


def _extra_input(graph_module: fx.GraphModule, what: str, index: int, context: PassContext) -> fx.Node:
    context.extra_inputs.append((what, index))
    return fx_utils.add_placeholder(graph_module, f"onlinequant_{what}_{index}")


def _is_quantize(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is ops.quantize
