"""The texts on the nodes: updates count only for a node's current settings, and reloaded pages get them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onlinequant_backend.progress import Listener, Update

STALE = "new settings, not sampled with yet"


class Statuses:
    """The text on each node, by its id.

    ``send(text, node)`` shows a text in all open pages.
    """

    def __init__(self, send: Callable[[str, str], None]) -> None:
        self._send = send
        self._current: dict[str, object] = {}
        self._shown: dict[str, dict[str, Any]] = {}

    def listener(self, node: str, kind: str, settings: Mapping[str, Any], subject: object = None) -> Listener:
        """A function that shows updates on a node, until a listener for other ``settings`` or another ``subject``, the
        model, replaces it: a compile for the old ones may continue for minutes. ``kind`` and ``settings``, the values
        of its widgets, distinguish the node from another workflow's with the same id.
        """
        mine = kind, dict(settings), id(subject)
        if self._current.get(node, mine) != mine:
            self._show(node, kind, settings, STALE)
        self._current[node] = mine

        def listen(update: Update) -> None:
            if self._current.get(node) == mine:
                self._show(node, kind, settings, update.text)

        return listen

    def shown(self) -> list[dict[str, Any]]:
        """The texts of all nodes as JSON-ready data: "node", "type", "settings" and "text"."""
        return list(self._shown.values())

    def _show(self, node: str, kind: str, settings: Mapping[str, Any], text: str) -> None:
        self._shown[node] = {"node": node, "type": kind, "settings": dict(settings), "text": text}
        self._send(text, node)
