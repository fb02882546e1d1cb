"""A method of a model that runs through the backend for as long as a call takes, and in float where that fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from onlinequant_backend import OnlineQuantError, onlinequant
from onlinequant_backend.progress import Listener

_log = logging.getLogger("onlinequant")

# Of one method, over all models of its class, with all their options, patches and ControlNets. Dynamo's own limit is 8,
# after which it leaves everything in float without a word.
_MOST_GRAPHS = 64


class CompiledMethod:
    """What one node has compiled.

    Models are shared with other nodes, which must not notice: the method is put in place for each call alone.
    """

    def __init__(self, options: Mapping[str, Any], listener: Listener) -> None:
        self._options = dict(options)
        self._listener = listener
        self._original: Callable[..., Any] | None = None
        self._compiled: Callable[..., Any] | None = None
        self._failed = False

    @contextlib.contextmanager
    def in_place(self, module: torch.nn.Module, name: str) -> Iterator[None]:
        """Within the block, ``module.name`` is compiled; afterwards it is what it was before."""
        if self._failed:
            yield
            return
        missing = object()
        before = vars(module).get(name, missing)
        setattr(module, name, self._guarded(getattr(module, name)))
        try:
            yield
        finally:
            if before is missing:
                delattr(module, name)
            else:
                setattr(module, name, before)

    def give_up(self, error: Exception) -> None:
        """Go on in float, and say why."""
        self._failed = True
        trace = None if isinstance(error, OnlineQuantError) else error  # a mistake of the user's says all by itself
        _log.warning("onlinequant failed, so the model goes on in float: %s", error, exc_info=trace)
        self._listener(f"in float, since it failed: {error}")

    def _guarded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``original`` through the backend; as it is, from then on, where that fails."""
        if original != self._original:
            # With equal options, Dynamo takes the graphs that it has. A dict of its own, since torch may change it.
            self._compiled = torch.compile(original, backend=onlinequant, options=dict(self._options))
            self._original = original
        compiled = self._compiled
        assert compiled is not None

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._failed:
                return original(*args, **kwargs)
            try:
                with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
                    return compiled(*args, **kwargs)
            except Exception as error:
                # If this fails as well, it is no fault of ours, and ComfyUI's to deal with.
                result = original(*args, **kwargs)
                self.give_up(error)
                return result

        return call
