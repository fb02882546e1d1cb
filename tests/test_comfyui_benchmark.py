"""What the benchmark of ComfyUI's workflows posts and what it makes of the answers, without a ComfyUI."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import comfyui_graphs as graphs
from benchmarks import comfyui_tables as tables
from benchmarks.comfyui_events import measured, step_ms, trouble
from benchmarks.comfyui_graphs import VARIANTS, WORKFLOWS, Change

SDXL, SD15, SVD = WORKFLOWS["sdxl-1024"], WORKFLOWS["sd15-512-b4"], WORKFLOWS["svd"]


def kinds(graph: graphs.Graph) -> list[str]:
    return [node["class_type"] for node in graph.values()]


def path_of_the_model(graph: graphs.Graph) -> list[str]:
    """The nodes that the model goes through, from the sampler to the loader."""
    (node,) = (node for node in graph.values() if node["class_type"] == "KSampler")
    path = []
    while "model" in node["inputs"]:
        node = graph[node["inputs"]["model"][0]]
        path.append(node["class_type"])
    return path


@pytest.mark.parametrize("workflow", WORKFLOWS.values(), ids=WORKFLOWS)
def test_variants_differ_in_the_path_of_the_model_alone(workflow: graphs.Workflow) -> None:
    found = {variant: kinds(graphs.graph(workflow, variant, 1)) for variant in VARIANTS}
    compilers = {"compiled": "TorchCompileModel", "quantized": "OnlineQuantModel"}
    for variant, compiler in compilers.items():
        found[variant].remove(compiler)
        assert found[variant] == found["baseline"]


def test_a_workflow_has_its_own_sizes() -> None:
    graph = graphs.graph(SD15, "baseline", 7)
    inputs = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert inputs["EmptyLatentImage"] == {"width": 512, "height": 512, "batch_size": 4}
    assert inputs["CheckpointLoaderSimple"]["ckpt_name"] == "full_sd15.safetensors"
    assert (inputs["KSampler"]["seed"], inputs["KSampler"]["steps"], inputs["KSampler"]["cfg"]) == (7, 20, 8.0)
    video = {node["class_type"]: node["inputs"] for node in graphs.graph(SVD, "baseline", 7).values()}
    assert video["SVD_img2vid_Conditioning"]["video_frames"] == 25


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("before", ["OnlineQuantModel", "LoraLoaderModelOnly", "CheckpointLoaderSimple"]),
        ("after", ["LoraLoaderModelOnly", "OnlineQuantModel", "CheckpointLoaderSimple"]),
    ],
)
def test_a_lora_stands_before_or_after_the_node(place: str, path: list[str]) -> None:
    change = Change(lora=0.5, lora_place=place)
    assert path_of_the_model(graphs.graph(SDXL, "quantized", 1, change)) == path
    in_float = [kind for kind in path if kind != "OnlineQuantModel"]
    assert path_of_the_model(graphs.graph(SDXL, "baseline", 1, change)) == in_float


def test_a_control_net_is_in_8_bit_where_the_model_is() -> None:
    assert "OnlineQuantControlNet" in kinds(graphs.graph(SD15, "quantized", 1, Change(control=True)))
    graph = graphs.graph(SD15, "baseline", 1, Change(control=True))
    assert "OnlineQuantControlNet" not in kinds(graph)
    (sampler,) = (node["inputs"] for node in graph.values() if node["class_type"] == "KSampler")
    assert graph[sampler["positive"][0]]["class_type"] == graph[sampler["negative"][0]]["class_type"]
    assert graph[sampler["positive"][0]]["class_type"] == "ControlNetApplyAdvanced"


def test_every_change_ends_where_it_began_and_has_files() -> None:
    for workflow in WORKFLOWS.values():
        found = graphs.changes(workflow)
        assert all(steps[-1].change == Change() for steps in found.values())
        assert len(set(graphs.seeds(workflow).values())) == sum(map(len, found.values()))
        files = {model["file"] for model in graphs.models(workflow, found)}
        for step in (step for steps in found.values() for step in steps):
            graph = graphs.graph(workflow, "quantized", 1, step.change)
            inputs = [node["inputs"] for node in graph.values()]
            names = ("ckpt_name", "lora_name", "control_net_name")
            assert {entry[name] for entry in inputs for name in names if name in entry} <= files


def event(
    time: float, event: str, node: str | None = None, phases: tuple[str, ...] = (), done: int = 0
) -> dict[str, Any]:
    return {"event": event, "time": time, "node": node, "phases": list(phases), "value": done}


def test_times_of_nodes_and_steps() -> None:
    graph = {"1": {"class_type": "KSampler"}, "2": {"class_type": "VAEDecode"}}
    events = [
        event(10.0, "executing", "1"),
        event(11.0, "progress", "1", ("calibrating",), 1),
        event(11.5, "progress", "1", ("compiling",), 2),
        event(13.5, "progress", "1", ("compiling",), 4),  # of every other step nobody was told
        event(14.0, "executing", "2"),
        event(14.2, "progress", "2"),
        event(14.5, "executing", None),
    ]
    messages = [["execution_start", {"timestamp": 9500}], ["execution_success", {"timestamp": 14600}]]
    found = measured(graph, events, {"status_str": "success", "messages": messages})
    assert found["seconds"] == pytest.approx(5.1)
    assert found["nodes"] == {"KSampler": 4.0, "VAEDecode": 0.5} and found["sampler"] == 4.0
    assert (found["steps"], found["steps_in_8_bit"]) == (4, 0)
    # The step in which observing ended is of neither kind: part of it may have been timing layers.
    assert step_ms([found], "compiling") == 1000.0 and step_ms([found], "calibrating") is None
    # A graph that is in 8 bit says nothing of a step while another one is compiled.
    prompts = [{"step_ms": [(5.0, ["compiling", "quantized"]), (1.0, ["float", "quantized"])]}]
    assert step_ms(prompts, "compiling") == 5.0 and step_ms(prompts, "quantized") == 1.0


def test_a_prompt_may_go_over_to_8_bit_while_it_is_drawn() -> None:
    phases = ("compiling", "quantized"), ("quantized",), ("quantized", "float")
    events = [event(float(time), "progress", "1", phase, time + 1) for time, phase in enumerate(phases)]
    status = {"status_str": "success", "messages": [["execution_start", {"timestamp": 0}]]}
    found = measured({"1": {"class_type": "KSampler"}}, events, status)
    assert tables.drawn_in(found) == "8 bit in 2 of 3 steps"
    assert tables.drawn_in({**found, "steps_in_8_bit": 3}) == "8 bit"
    assert tables.drawn_in({**found, "steps_in_8_bit": 0}) == "float"


def test_trouble_in_a_log() -> None:
    log = """starting
Traceback (most recent call last):
  File "main.py", line 1, in f
    f()
ValueError: no
[onlinequant warning] WARNING: layers stay in float
/x/onlinequant/onlinequant_backend/report.py:12: UserWarning: old
/x/site-packages/torch/a.py:12: UserWarning: of torch"""
    found = trouble(log)
    assert found["tracebacks"] == ["ValueError: no"]
    assert [line[:12] for line in found["warnings"]] == ["[onlinequant", "/x/onlinequa"]


def prompt(variant: str, part: str, seconds: float, run: int = 1, **more: Any) -> dict[str, Any]:
    record = {"what": "prompt", "workflow": "sdxl-1024", "variant": variant, "part": part, "run": run, "tiny": False}
    return {
        **record,
        "seconds": seconds,
        "sampler": seconds - 0.5,
        "trace_seconds": 0.0,
        "step_ms": [],
        "steps": 20,
        "steps_in_8_bit": 20,
        **more,
    }


def test_medians_are_of_the_last_run() -> None:
    records = [prompt("baseline", "later", 9.0, run=1), prompt("baseline", "first", 20.0, run=1)]
    records += [
        prompt("baseline", "later", seconds, run=2, peak_mib=peak) for seconds, peak in ((3, 5), (4, 7), (8, 6))
    ]
    (cell,) = tables.cells(records).values()
    assert (cell.first, cell.later, cell.sampler, cell.later_peak) == (20.0, 4, 3.5, 7)


def test_targets_are_met_missed_or_not_run() -> None:
    records = [
        prompt("baseline", "later", 4.0),
        prompt("quantized", "later", 1.0),
        prompt("quantized", "restart", 31.0),
    ]
    goals = tables.targets(tables.cells(records), {"sdxl-1024": "SDXL"})
    met = {goal.text: (goal.reached, goal.met) for goal in goals}
    assert met["SDXL: later prompts at least 70% less than baseline"] == ("75%", True)
    assert met["SDXL: later prompts at least 50% less than TorchCompileModel"] == ("not run", None)
    assert met["SDXL: first prompt after a restart in at most 30 s"] == ("31.0 s", False)


def test_tables_of_incomplete_records() -> None:
    records = [prompt("quantized", "first", 12.0, peak_mib=2048), prompt("compiled", "later", 2.0, peak_mib=None)]
    text = tables.main_table(tables.cells(records), {"sdxl-1024": "SDXL"})
    widths = {len(line) for line in text.splitlines()}
    assert len(widths) == 1 and "12.0 s" in text and "2.0 GiB" in text


def test_a_change_is_compared_with_the_baseline_s() -> None:
    costs: dict[str, Any] = {"label": "cfg 0: cfg 1", "waited": 0, "traces": 1, "compiles": 0}
    records = [prompt("baseline", "change", 3.0, **costs), prompt("quantized", "change", 2.0, **costs)]
    text = tables.changes_table(json.loads(json.dumps(records)), "sdxl-1024")
    assert "-1.0 s" in text and "8 bit" in text and "| cfg 1 " in text
    assert not tables.lora_targets(records, "sdxl-1024", "SDXL")
    records += [
        prompt("baseline", "change", 3.0, label="lora 0: 1.0"),
        prompt("quantized", "change", 5.0, label="lora 0: 1.0", traces=0),
    ]
    assert [goal.met for goal in tables.lora_targets(records, "sdxl-1024", "SDXL")] == [False, True]


def test_what_was_not_run_is_said_until_it_is() -> None:
    server = {"what": "server", "server": "1", "tracebacks": ["ValueError: no"], "warnings": [], "died": True}
    left_out = {"what": "not run", "text": "svd", "reason": "no time left"}
    lines = list(tables.trouble_lines([server, left_out]))
    assert lines[0] == "1 servers: 1 tracebacks, 0 warnings of onlinequant, 1 ended by themselves."
    assert lines[-1] == "- not run: svd: no time left"
    assert not any("svd" in line for line in tables.trouble_lines([left_out, {"what": "done", "text": "svd"}]))
