"""A custom node without nodes: what ``comfyui_workflows.py`` asks a running ComfyUI.

``GET /onlinequant_benchmark`` answers with what has happened since ``?reset=1`` was last asked for: ComfyUI's own
events with their times and the phases of all graphs at that moment, Dynamo's and Inductor's counters, the graphs that
this backend has, and torch's memory. ``POST /onlinequant_benchmark/models`` writes random models.

What this backend logs is printed with its time, warnings marked, since ComfyUI's log shows neither.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from aiohttp import web
from server import PromptServer

from . import checkpoints

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
MARK = "[onlinequant warning]"
EVENTS = ("executing", "execution_start", "execution_success", "execution_error", "progress")

_events: list[dict[str, Any]] = []


def _reports() -> Sequence[Any]:
    """What the backend says of each of its graphs; nothing while it is not loaded."""
    backend = sys.modules.get("onlinequant_backend")
    return [] if backend is None else backend.reports()


def _phases() -> list[str]:
    return [report.phase for report in _reports()]


def _recorded(send: Any) -> Any:
    """``PromptServer.send_sync`` that keeps what ``EVENTS`` names, whether or not anybody listens."""

    def record(event: Any, data: Any, sid: Any = None) -> Any:
        if event in EVENTS:
            kept = {name: data.get(name) for name in ("node", "value", "max")}
            _events.append({"event": event, "time": time.time(), "phases": _phases(), **kept})
        return send(event, data, sid)

    return record


class _Marked(logging.Handler):
    """Prints what this backend logs, warnings and errors as lines that can be found."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = MARK if record.levelno >= logging.WARNING else "[onlinequant]"
        text = record.getMessage().replace("\n", " ")
        print(f"{mark} {record.levelname} {time.time():.2f}: {text}", file=sys.stderr, flush=True)


def _state() -> dict[str, Any]:
    graphs = [
        {
            "model": report.model,
            "phase": report.phase,
            "reason": report.phase_reason,
            "precision": report.precision,
            "compile_seconds": report.compile_seconds,
            "cache_hit": report.cache_hit,
            "quantized": sum(decision.quantized for decision in report.decisions),
            "layers": len(report.decisions),
        }
        for report in _reports()
    ]
    state: dict[str, Any] = {"events": _events, "graphs": graphs, **_compiled()}
    if torch.cuda.is_available():
        state["torch_peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    return state


def _compiled() -> dict[str, float]:
    """What Dynamo and Inductor have done in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return {"traces": 0, "compiles": 0, "trace_seconds": 0.0}
    seconds = {name: sum(times) for name, times in list(utils.compilation_time_metrics.items())}
    whole = seconds.get("_compile.compile_inner", 0.0)
    return {
        "traces": utils.counters["stats"]["unique_graphs"],
        "compiles": utils.counters["inductor"]["fxgraph_cache_miss"],
        "trace_seconds": whole - seconds.get("OutputGraph.call_user_compiler", 0.0),
    }


_routes = PromptServer.instance.routes


@_routes.get("/onlinequant_benchmark")
async def _answer(request: web.Request) -> web.Response:
    reply = web.json_response(_state())
    if "reset" in request.query:
        _events.clear()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    return reply


@_routes.post("/onlinequant_benchmark/models")
async def _write_models(request: web.Request) -> web.Response:
    body = await request.json()
    loop = asyncio.get_running_loop()
    written = await loop.run_in_executor(None, checkpoints.write, body["models"], body["tiny"])
    return web.json_response(written)


PromptServer.instance.send_sync = _recorded(PromptServer.instance.send_sync)
_backend_log = logging.getLogger("onlinequant")
_backend_log.addHandler(_Marked())
_backend_log.setLevel(logging.DEBUG)  # how long each part took is in the server's log
