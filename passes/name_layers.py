from __future__ import annotations

import re

import torch.fx as fx

from onlinequant_backend.graph import parameter_names
from onlinequant_backend.graph.layer_info import (
    CONV_TARGETS,
    LINEAR_TARGETS,
    TRANSPOSED_TARGETS,
    LayerInfo,
    info_of,
    weight_parameter,
)

from .context import PassContext

_KINDS: dict[object, str] = {
    **dict.fromkeys(LINEAR_TARGETS, "linear"),
    **dict.fromkeys(CONV_TARGETS + TRANSPOSED_TARGETS, "conv"),
}

_PLUMBING = ("__dict__", "_modules", "_orig_mod")


def name_layers(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Mark every conv and linear node with a ``LayerInfo`` that holds its fully qualified name.

    Before::

        %conv2d = call_function[target=torch.conv2d](args = (%x, %l_self_..._conv1_parameters_weight_, ...))

    After: the same, with ``meta["onlinequant"] = LayerInfo("down_blocks.0.resnets.0.conv1", "conv", ...)``.

    A weight that is computed inside the graph has no name; its layer gets the module's.
    """
    named = 0
    names = parameter_names.parameter_names(graph_module)
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node.target not in _KINDS or info_of(node) is not None:
            continue
        parameter = weight_parameter(node)
        if parameter is None:
            info = LayerInfo(module_name(node), _KINDS[node.target])
        else:
            name = names[parameter].removesuffix(".weight")
            info = LayerInfo(name, _KINDS[node.target], weight=parameter.name)
        node.meta["onlinequant"] = info
        named += 1
    return named


def module_name(node: fx.Node) -> str:
    """The qualified name of the module that makes a call, or the node's if the model itself makes it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return str(node.name)
    path = re.sub(r"^L(\['(self|fn)'\])?", "", list(stack.values())[-1][0])  # a local variable of what was compiled
    parts = re.split(r"\['?|'?\]|\.", path)
    return ".".join(part for part in parts if part and part not in _PLUMBING) or str(node.name)
