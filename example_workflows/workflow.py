"""A workflow: its nodes, in the order in which they run, each in a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias


class Link(NamedTuple):
    """An output of a node, by the node's id."""

    node: int
    output: int


@dataclasses.dataclass(frozen=True)
class Look:
    """How a node is drawn.

    Attributes:
        title: what is written above it; empty for what ComfyUI calls it.
        room: height in pixels of what the node shows once it has run.
        width: in pixels; all nodes of a group are as wide as the widest.
    """

    title: str = ""
    room: int = 0
    width: int = 420


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of ComfyUI's; where it stands for a value, its first output is meant.

    Attributes:
        kind: what ComfyUI calls its class.
        inputs: every widget has its value here, so that both formats say the same.
    """

    id: int
    group: str
    kind: str
    look: Look
    inputs: Mapping[str, Value | Link]

    def __getitem__(self, output: int) -> Link:
        return Link(self.id, output)


Value: TypeAlias = "int | float | str | bool"
Input: TypeAlias = "Value | Link | Node"

PLAIN, PROGRESS, PREVIEW = Look(), Look(room=80), Look(room=320)


class Workflow:
    """A workflow, made node by node.

    Attributes:
        title: what ComfyUI lists it as: the name of its file.
        note: Markdown that people see beside it.
    """

    def __init__(self, title: str, note: str) -> None:
        self.title = title
        self.note = f"# {title}\n\n{note}"
        self.nodes: list[Node] = []

    def add(self, group: str, kind: str, look: Look = PLAIN, /, **inputs: Input) -> Node:
        """Add a node, see there."""
        linked = {name: value[0] if isinstance(value, Node) else value for name, value in inputs.items()}
        node = Node(len(self.nodes) + 1, group, kind, look, linked)
        self.nodes.append(node)
        return node
