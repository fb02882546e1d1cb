from __future__ import annotations

import itertools
import logging
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx

from onlinequant_backend.graph import fx_utils, info_of
from onlinequant_backend.graph.aliasing import Memory
from onlinequant_backend.graph.repeated_runs import repeated_runs
from onlinequant_backend.torch_internals import dynamo_interface

from .context import PassContext

_log = logging.getLogger("onlinequant")

# Regions of fewer calls are not outlined, nor those that save less than this share of the graph's calls.
_LEAST_CALLS, _LEAST_SAVED = 20, 0.02
# The cost, in calls, of a tensor that crosses a border: its producer and its readers cannot be fused.
_CROSSING = 3


class _Region(NamedTuple):
    """Equal runs of ``length`` calls, which begin at each of ``starts`` in graph order."""

    length: int
    starts: list[int]


def outline_regions(graph_module: fx.GraphModule, context: PassContext) -> int:
    """Turn repeated regions, such as transformer blocks, into subgraphs, each of which is compiled once.

    Before::

        %a = call_function[target=...](args = (%x, %weight_0))  # and some more, like those of %b
        %b = call_function[target=...](args = (%a, %weight_1))

    After, with ``region_0`` a submodule::

        %call = call_function[target=invoke_subgraph](args = (%region_0, "region_0", %x, %weight_0))
        %a = call_function[target=operator.getitem](args = (%call, 0))
        %call_1 = call_function[target=invoke_subgraph](args = (%region_0, "region_0", %a, %weight_1))
        %b = call_function[target=operator.getitem](args = (%call_1, 0))

    Regions are equal in every call, constant, shape, stride and dtype, and in how their values depend on each other.
    Returns the number of regions. Does not change graphs that write in place, have symbolic sizes, or return results
    that share memory with an input or another result. Runs last.
    """
    if not _may_be_outlined(graph_module, context):
        return 0
    try:
        values = context.values(graph_module)
    except Exception:  # what cannot be run with fake tensors
        _log.debug("not compiled in regions: the results' strides are not known", exc_info=True)
        return 0
    # Rewriting has changed strides: those of the traced graph would make regions of calls that differ.
    for node, value in values.items():
        node.meta["example_value"] = value
    number = 0
    calls = _calls(graph_module)
    least_saved = int(_LEAST_SAVED * len(calls))
    while (region := _best_region(calls, least_saved)) is not None:
        _outline(graph_module, calls, region, f"region_{number}")
        number += 1
        calls = _calls(graph_module)
    return number


def _may_be_outlined(graph_module: fx.GraphModule, context: PassContext) -> bool:
    is_symbolic = any(isinstance(_example(node), torch.SymInt) for node in fx_utils.placeholders(graph_module))
    in_place = any(map(fx_utils.writes_in_place, graph_module.graph.nodes))
    return context.in_regions and not is_symbolic and not in_place and not Memory(graph_module).has_results_in_common()


def _calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op in ("call_function", "call_method", "call_module")]


def _best_region(calls: Sequence[fx.Node], least_saved: int) -> _Region | None:
    """The region that saves most calls."""
    numbers: dict[str, int] = {}
    tokens = [numbers.setdefault(_token(call, position), len(numbers)) for position, call in enumerate(calls)]
    best, most = None, least_saved
    for candidate in _candidates(tokens):
        if _saved(candidate) <= most:  # trimming cannot make it better
            continue
        region = _trimmed(calls, candidate)
        if region.length < _LEAST_CALLS:
            continue
        saved = _saved(region)
        if saved > most:
            saved -= _CROSSING * len(region.starts) * _crossings(calls, region)
        if saved > most:
            alike = _alike(calls, region)
            saved -= (len(region.starts) - len(alike.starts)) * region.length
            if saved > most and len(alike.starts) > 1:
                best, most = alike, saved
    return best


def _saved(region: _Region) -> int:
    """Calls that need not be compiled."""
    return (len(region.starts) - 1) * region.length


def _candidates(tokens: Sequence[int]) -> Iterator[_Region]:
    """Runs that are repeated without overlaps."""
    for longest, positions in repeated_runs(tokens):
        # Immediate repetitions overlap: the period is the region.
        periods = {after - before for before, after in itertools.pairwise(positions) if after - before < longest}
        for length in {longest, *periods}:
            if length >= _LEAST_CALLS:
                starts: list[int] = []
                for position in positions:
                    if not starts or position >= starts[-1] + length:
                        starts.append(position)
                yield _Region(length, starts)


def _trimmed(calls: Sequence[fx.Node], region: _Region) -> _Region:
    """The region without calls at its ends because of which a tuple would cross its border, which only tensors can;
    empty if such a call is in its middle. A region may begin by unpacking a tuple, or end by making one."""
    inside = _inside(calls, region, region.starts[0])
    own = set(inside)
    takes = [any(_is_tuple(node) and node not in own for node in call.all_input_nodes) for call in inside]
    makes = [_is_tuple(call) and not own.issuperset(call.users) for call in inside]
    first, last = 0, len(inside)
    while first < last and takes[first]:
        first += 1
    while first < last and makes[last - 1]:
        last -= 1
    if any(takes[first:last]) or any(makes[first:last]):
        return _Region(0, [])
    return _Region(last - first, [start + first for start in region.starts])


def _is_tuple(node: fx.Node) -> bool:
    value = _example(node)
    if value is None:  # nodes added by rewriting have no example
        return node.op != "placeholder" and any(user.target is operator.getitem for user in node.users)
    return isinstance(value, (tuple, list))


def _token(call: fx.Node, position: int) -> str:
    """A string that is equal for calls of the same operation on tensors of the same kind."""
    if "outlined" in call.meta:
        return f"outlined {position}"
    args = fx.map_arg((call.args, call.kwargs), lambda node: _Shown(_kind(node)))
    # Inputs added by rewriting have no example.
    info = info_of(call)
    layer = (info.input_shape, info.weight_shape, info.dtype) if info is not None else None
    return f"{call.op} {_target(call)} {args} {_kind(call)} {layer}"


class _Shown(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _target(call: fx.Node) -> str:
    return call.target if isinstance(call.target, str) else f"{call.target} {id(call.target)}"


def _kind(node: fx.Node) -> str:
    value = _example(node)
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}"
    return type(value).__name__


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _crossings(calls: Sequence[fx.Node], region: _Region) -> int:
    """The number of tensors that enter the first such region from earlier calls, or are read after it."""
    inside = _inside(calls, region, region.starts[0])
    return len(list(_read_outside(inside))) + sum(node.op.startswith("call") for node in _inputs(inside))


def _inside(calls: Sequence[fx.Node], region: _Region, start: int) -> Sequence[fx.Node]:
    return calls[start : start + region.length]


def _alike(calls: Sequence[fx.Node], region: _Region) -> _Region:
    """The region with only those occurrences that have the most common data flow."""
    groups: dict[str, list[int]] = defaultdict(list)
    for start in region.starts:
        groups[_wiring(_inside(calls, region, start))].append(start)
    return _Region(region.length, max(groups.values(), key=len))


def _wiring(inside: Sequence[fx.Node]) -> str:
    names = {call: _Shown(f"%{index}") for index, call in enumerate(inside)}
    inputs = {node: _Shown(f"@{index}") for index, node in enumerate(_inputs(inside))}
    return "\n".join(str(fx.map_arg((call.args, call.kwargs), {**inputs, **names}.__getitem__)) for call in inside)


def _inputs(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """The inputs of a region, in the order of their first use."""
    own = set(inside)
    return list(dict.fromkeys(node for call in inside for node in call.all_input_nodes if node not in own))


def _outline(graph_module: fx.GraphModule, calls: Sequence[fx.Node], region: _Region, name: str) -> None:
    outputs = sorted({index for start in region.starts for index in _read_outside(_inside(calls, region, start))})
    graph_module.add_submodule(name, _subgraph(graph_module, _inside(calls, region, region.starts[0]), outputs))
    for start in region.starts:
        _replace(graph_module, _inside(calls, region, start), outputs, name)


def _read_outside(inside: Sequence[fx.Node]) -> Iterator[int]:
    own = set(inside)
    return (index for index, call in enumerate(inside) if not own.issuperset(call.users))


def _subgraph(graph_module: fx.GraphModule, inside: Sequence[fx.Node], outputs: Sequence[int]) -> fx.GraphModule:
    subgraph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in _inputs(inside):
        copies[node] = subgraph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for call in inside:
        copies[call] = subgraph.node_copy(call, copies.__getitem__)
    subgraph.output(tuple(_own(subgraph, copies, inside, inside[index], outputs) for index in outputs))
    return fx.GraphModule(graph_module, subgraph)


def _own(
    subgraph: fx.Graph,
    copies: Mapping[fx.Node, fx.Node],
    inside: Sequence[fx.Node],
    result: fx.Node,
    outputs: Sequence[int],
) -> fx.Node:
    """A result in memory of its own: results of ``invoke_subgraph`` must not alias, and Inductor adds a view's offset
    twice."""
    value = _example(result)
    if not isinstance(value, torch.Tensor):
        return copies[result]
    others = [*_inputs(inside), *(inside[index] for index in outputs if inside[index] is not result)]
    shared = {other.untyped_storage()._cdata for other in map(_example, others) if isinstance(other, torch.Tensor)}
    if value.untyped_storage()._cdata in shared or value.storage_offset() != 0:
        return subgraph.call_method("clone", (copies[result],))
    return copies[result]


def _replace(graph_module: fx.GraphModule, inside: Sequence[fx.Node], outputs: Sequence[int], name: str) -> None:
    own = set(inside)
    with graph_module.graph.inserting_before(inside[-1].next):
        region = graph_module.graph.get_attr(name)
        call = graph_module.graph.call_function(dynamo_interface.invoke_subgraph, (region, name, *_inputs(inside)))
        call.meta["outlined"] = True
        for position, index in enumerate(outputs):
            result = graph_module.graph.call_function(operator.getitem, (call, position))
            result.meta = {**inside[index].meta, "outlined": True}
            inside[index].replace_all_uses_with(result, delete_user_cb=lambda user: user not in own)
    for node in reversed(inside):
        graph_module.graph.erase_node(node)
