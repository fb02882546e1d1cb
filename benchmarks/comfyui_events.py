"""What ComfyUI's events and its log say about a prompt."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

GOING_ON, DONE = ("compiling", "calibrating"), ("quantized", "float")  # the phases of a graph


def measured(
    graph: Mapping[str, Any], events: Sequence[Mapping[str, Any]], status: Mapping[str, Any]
) -> dict[str, Any]:
    """What ComfyUI's events say about a prompt.

    "seconds" are ComfyUI's own, from the begin of its execution to its end; "nodes" those of each kind of node, of
    which "sampler" is KSampler's; "step_ms" the milliseconds from each step's end to the next one's, with the phases
    that graphs were in at both; "steps" how many there were, "steps_in_8_bit" in how many of them no graph was in float
    that was still to be observed or compiled.
    """
    times = {kind: data["timestamp"] / 1000 for kind, data in status["messages"]}
    end = max(times.values())
    nodes: dict[str, float] = {}
    running: tuple[str, float] | None = None
    # ComfyUI tells of ten steps a second at most: when how many were done, and the phases of the graphs by then.
    progress: list[tuple[float, int, list[str]]] = []
    for event in events:
        node = graph.get(str(event["node"]), {}).get("class_type", "")
        if event["event"] == "progress" and node == "KSampler":
            progress.append((event["time"], int(event["value"]), sorted(set(event["phases"]))))
        if event["event"] != "progress" and running:
            nodes[running[0]] = nodes.get(running[0], 0.0) + event["time"] - running[1]
            running = None
        if event["event"] == "executing" and node:
            running = (node, event["time"])
    steps, in_8_bit = [], 0
    for (last, before, old), (now, after, new) in itertools.pairwise([(0.0, 0, []), *progress]):
        in_8_bit += (after - before) * ("quantized" in new and set(new) <= set(DONE))
        if before:  # when the first one began nobody says
            steps += [(1000 * (now - last) / (after - before), sorted({*old} & {*new}))] * (after - before)
    return {
        "status": status["status_str"],
        "seconds": end - times["execution_start"],
        "sampler": nodes.get("KSampler"),
        "nodes": nodes,
        "step_ms": steps,
        "steps": progress[-1][1] if progress else 0,
        "steps_in_8_bit": in_8_bit,
    }


def step_ms(prompts: Sequence[Mapping[str, Any]], phase: str) -> float | None:
    """The median of all steps of these prompts that were taken in this phase.

    Graphs that are in 8 bit already say nothing of a step while another one is observed or compiled.
    """
    before = GOING_ON[: GOING_ON.index(phase)] if phase in GOING_ON else GOING_ON
    all_steps = [step for prompt in prompts for step in prompt["step_ms"]]
    steps = [step for step, phases in all_steps if phase in phases and not {*before} & {*phases}]
    return statistics.median(steps) if steps else None


def trouble(log: str) -> dict[str, Any]:
    """Tracebacks in a server's log, by their last lines, and the warnings of this backend."""
    lines = log.splitlines()
    tracebacks = []
    for start, line in enumerate(lines):
        if "Traceback (most recent call last)" in line:
            rest = (text for text in lines[start + 1 :] if text and not text.startswith(" "))
            tracebacks.append(next(rest, line)[:300])
    ours = r"\[onlinequant warning\]|(onlinequant_backend|comfy_integration|passes)/\S+\.py:\d+: \w*Warning"
    return {"tracebacks": tracebacks, "warnings": [line[:300] for line in lines if re.search(ours, line)]}
