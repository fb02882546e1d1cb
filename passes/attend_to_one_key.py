from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from onlinequant_backend.graph import fx_utils
from onlinequant_backend.graph.aliasing import Memory
from onlinequant_backend.graph.layer_info import LINEAR_TARGETS

from .context import PassContext

_RESHAPES = ("reshape", "view")
_SUMS = (operator.add, torch.add)


def attend_to_one_key(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Replace attention to one key by its value: softmax over one key is 1 whatever the query. SVD's cross-attention is
    of this kind.

    Before::

        %query = call_function[target=torch._C._nn.linear](args = (%norm, %w_q, None))
        %attention = call_function[target=scaled_dot_product_attention](args = (%query_1, %key_1, %value_1))
        %transpose = call_method[target=transpose](args = (%attention, 1, 2))
        %reshape = call_method[target=reshape](args = (%transpose, 2, -1, 64))
        %out = call_function[target=torch._C._nn.linear](args = (%reshape, %w, %b))
        %add = call_function[target=operator.add](args = (%out, %hidden))

    After, for one token instead of all queries; the norm, the projections of queries and keys, and the attention are
    gone::

        %transpose = call_method[target=transpose](args = (%value_1, 1, 2))
        %reshape = call_method[target=reshape](args = (%transpose, 2, 1, 64))
        %out = call_function[target=torch._C._nn.linear](args = (%reshape, %w, %b))
        %add = call_function[target=operator.add](args = (%out, %hidden))

    Where no sum with a tensor of all queries follows, the result is repeated. The values are the same, up to rounding
    in a matrix product of another size, if queries and keys are finite, and so are the strides. Does not change
    attention with a mask or dropout, attention without a projection after it, and results that are written in place.
    """
    memory = Memory(graph_module)
    changed = 0
    for node in list(graph_module.graph.nodes):
        if node.target is F.scaled_dot_product_attention and _has_one_key(node):
            changed += _replace(graph_module, node, memory)
    return changed


def _has_one_key(attention: fx.Node) -> bool:
    query, key, value = (fx_utils.argument(attention, at, name) for at, name in enumerate(("query", "key", "value")))
    if fx_utils.argument(attention, 3, "attn_mask") is not None or fx_utils.argument(attention, 4, "dropout_p", 0.0):
        return False
    if not all(isinstance(node, fx.Node) for node in (query, key, value)):
        return False
    found, given = fx_utils.example(attention), fx_utils.example(value)
    is_alike = found.dtype == given.dtype and _are_same(found.shape[:-2], given.shape[:-2])  # else heads are repeated
    size = fx_utils.example(key).shape[-2]
    return is_alike and found.dim() >= 3 and isinstance(size, int) and size == 1


def _are_same(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether sizes are the same expressions, without a guard that they are equal."""
    return tuple(map(str, sizes)) == tuple(map(str, others))


def _replace(graph_module: fx.GraphModule, attention: fx.Node, memory: Memory) -> bool:
    """Have what follows compute one token as far as that is possible; returns whether anything changed."""
    value = fx_utils.argument(attention, 2, "value")
    steps = _steps(attention)
    nodes = [value, attention, *(node for node, _ in steps)]
    last = nodes[-1]
    # Without a projection, little would be saved.
    is_projected = any(node.target in LINEAR_TARGETS for node, _ in steps)
    if not (is_projected and fx_utils.example(last).is_contiguous()) or any(map(memory.is_written, nodes)):
        return False
    users = list(last.users)
    if not (len(users) == 1 and _adds_all_tokens(users[0], last)) and not _expand(graph_module, last, memory):
        return False
    for node, dim in steps:
        _shorten(node, dim)
    attention.replace_all_uses_with(value)
    _erase_unused(graph_module, attention)
    return True


def _expand(graph_module: fx.GraphModule, node: fx.Node, memory: Memory) -> bool:
    """Repeat the one token that ``node`` will be for what reads all tokens; returns whether that is possible."""
    shape = fx_utils.example(node).shape
    if memory.returns(node) or not all(isinstance(size, int) for size in shape):
        return False
    with graph_module.graph.inserting_after(node):
        expanded = graph_module.graph.call_method("expand", (node, *shape))
    with graph_module.graph.inserting_after(expanded):
        repeated = graph_module.graph.call_method("contiguous", (expanded,))  # what follows may ask for a view
    expanded.meta, repeated.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(repeated, delete_user_cb=lambda user: user is not expanded)
    return True


def _steps(attention: fx.Node) -> list[tuple[fx.Node, int]]:
    """The calls after attention that treat each token alone, one after the other, and the tokens' dimension in the
    result of each."""
    found: list[tuple[fx.Node, int]] = []
    node, dim = attention, fx_utils.example(attention).dim() - 2
    while len(node.users) == 1:
        (user,) = node.users
        after = _dim_after(user, node, dim)
        if after is None:
            break
        found.append((user, after))
        node, dim = user, after
    return found


def _dim_after(user: fx.Node, node: fx.Node, dim: int) -> int | None:
    """The tokens' dimension in the result of ``user``, which reads ``node``; None unless it treats each token alone."""
    if not user.args or user.args[0] is not node or not isinstance(user.meta.get("example_value"), torch.Tensor):
        return None
    before, after = fx_utils.example(node), fx_utils.example(user)
    if user.target == "transpose" and len(user.args) == 3:
        dims = [int(at) % before.dim() for at in user.args[1:]]  # type: ignore[arg-type]
        return dims[1 - dims.index(dim)] if dim in dims else dim
    if user.target in _RESHAPES:
        are_same = _are_same(after.shape[: dim + 1], before.shape[: dim + 1])
        return dim if are_same and len(_sizes(user)) == after.dim() > dim else None
    if user.target in LINEAR_TARGETS:
        return dim if dim < before.dim() - 1 else None
    is_idle = fx_utils.is_idle_dropout(user) or user.target in ("contiguous", "to")
    is_scaled = user.target in (operator.truediv, operator.mul) and isinstance(user.args[1], (int, float))
    return dim if (is_idle or is_scaled) and user.all_input_nodes == [node] else None


def _sizes(reshape: fx.Node) -> Sequence[Any]:
    sizes = reshape.args[1:]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _shorten(node: fx.Node, dim: int) -> None:
    """Have ``node`` compute one token."""
    if node.target in _RESHAPES:
        sizes = list(_sizes(node))
        sizes[dim] = 1
        node.target, node.args = "reshape", (node.args[0], *sizes)
    before = fx_utils.example(node)
    node.meta["example_value"] = before.new_empty([1 if at == dim else size for at, size in enumerate(before.shape)])


def _adds_all_tokens(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` adds ``node`` to a tensor with all tokens, so that it need not be expanded."""
    if user.target not in _SUMS or len(user.args) != 2 or user.kwargs:
        return False
    others = [value for value in user.args if value is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return False
    value, total = others[0].meta.get("example_value"), user.meta.get("example_value")
    if not (isinstance(value, torch.Tensor) and isinstance(total, torch.Tensor)):
        return False
    # The sum takes its strides from the one operand that is left with all tokens.
    tensors = (fx_utils.example(node), value, total)
    return len({(tuple(map(str, each.shape)), tuple(map(str, each.stride()))) for each in tensors}) == 1


def _erase_unused(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Erase ``node``, which nothing reads, and all that it alone has read."""
    unused = {node: None}
    while unused:
        node, _ = unused.popitem()
        if node.users or node.op == "placeholder" or fx_utils.writes_in_place(node) or fx_utils.is_random(node):
            continue
        unused.update(dict.fromkeys(node.all_input_nodes))
        graph_module.graph.erase_node(node)
