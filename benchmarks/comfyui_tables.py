"""The tables of ``comfyui_workflows.py``, in Markdown, from the records that it writes."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.comfyui_events import step_ms
from benchmarks.comfyui_graphs import VARIANTS, WORKFLOWS

TITLES = {"baseline": "baseline", "compiled": "TorchCompileModel", "quantized": "OnlineQuant"}
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One workflow with one variant; None for what was not run. Seconds, MiB, and decibels of the picture.

    Attributes:
        first: first prompt of a cold start, of which ``first_sampler`` in the sampler and ``trace`` in Dynamo.
        later: median of the prompts in the steady state, of which ``sampler`` in the sampler.
        restart: first prompt of another server that finds what this one has saved.
        restart_in: whether that was drawn in 8 bit.
        until_8_bit: from the first prompt's start until nothing is observed or compiled any more.
        while_compiling: prompts meanwhile, in the median.
        step_before, step_during: milliseconds of a float step before and while it compiles, in the median.
        peak: memory of the whole GPU, with the first prompts; ``later_peak``: without.
        error, psnr: distance to the baseline's pictures of the same seeds, in the median.
    """

    first: float | None = None
    first_sampler: float | None = None
    trace: float | None = None
    later: float | None = None
    sampler: float | None = None
    restart: float | None = None
    restart_in: str = ""
    until_8_bit: float | None = None
    while_compiling: float | None = None
    step_before: float | None = None
    step_during: float | None = None
    peak: int | None = None
    later_peak: int | None = None
    error: float | None = None
    psnr: float | None = None


def cells(records: Iterable[Record]) -> dict[tuple[str, str], Cell]:
    """What records of one or more runs say; of each workflow, variant and part, the last run that has it."""
    parts: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record["what"] in ("prompt", "settled") and record["part"] != "change":
            place = (record["workflow"], record["variant"], record["part"])
            others = parts.get(place, [])
            parts[place] = [*(other for other in others if other["run"] == record["run"]), record]
    found: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for (workflow, variant, part), group in parts.items():
        found.setdefault((workflow, variant), {})[part] = group
    return {place: _cell(found[place]) for place in sorted(found, key=_order)}


def _order(place: tuple[str, str]) -> tuple[int, int]:
    return list(WORKFLOWS).index(place[0]), VARIANTS.index(place[1])


def _cell(parts: Mapping[str, Sequence[Record]]) -> Cell:
    def values(part: str, name: str) -> list[Any]:
        found = [record.get(name) for record in parts.get(part, ())]
        return [value for value in found if value is not None]

    def of(part: str, name: str) -> Any:
        found = values(part, name)
        return statistics.median(found) if found else None

    cold = [*parts.get("first", ()), *parts.get("during", ())]
    peaks = [peak for part in ("first", "during", "settled", "later", "restart") for peak in values(part, "peak_mib")]
    return Cell(
        first=of("first", "seconds"),
        first_sampler=of("first", "sampler"),
        trace=of("first", "trace_seconds"),
        later=of("later", "seconds"),
        sampler=of("later", "sampler"),
        restart=of("restart", "seconds"),
        restart_in=drawn_in(parts["restart"][-1]) if "restart" in parts else "",
        until_8_bit=of("settled", "until_8_bit"),
        while_compiling=of("during", "seconds"),
        step_before=step_ms(cold, "calibrating"),
        step_during=step_ms(cold, "compiling"),
        peak=max(peaks, default=None),
        later_peak=max(values("later", "peak_mib"), default=None),
        error=of("later", "error"),
        psnr=of("later", "psnr"),
    )


def main_table(found: Mapping[tuple[str, str], Cell], titles: Mapping[str, str]) -> str:
    """Workflow x variant; ``titles``: of the workflows."""
    headings = "workflow, variant, first prompt, later prompts, of these the sampler, first after a restart"
    rows = [[*headings.split(", "), "GPU memory, peak", "and later", "latent error", "PSNR"]]
    for (workflow, variant), cell in found.items():
        restart = cell.first if variant == "baseline" else cell.restart  # it keeps nothing
        rows.append(
            [
                titles[workflow],
                TITLES[variant],
                *(seconds(value) for value in (cell.first, cell.later, cell.sampler, restart)),
                *(_gigabytes(value) for value in (cell.peak, cell.later_peak)),
                _number(cell.error, "{:.3f}"),
                _number(cell.psnr, "{:.1f} dB"),
            ]
        )
    return markdown(rows)


def cold_table(found: Mapping[tuple[str, str], Cell], titles: Mapping[str, str]) -> str:
    """What a cold start of OnlineQuant consists of."""
    headings = "workflow, Dynamo's trace, prompts while it compiles, in 8 bit after, float step before, meanwhile"
    rows = [[*headings.split(", "), "first after a restart in"]]
    for (workflow, variant), cell in found.items():
        if variant == "quantized":
            steps = (_number(value, "{:.0f} ms") for value in (cell.step_before, cell.step_during))
            waits = (seconds(value) for value in (cell.trace, cell.while_compiling, cell.until_8_bit))
            rows.append([titles[workflow], *waits, *steps, cell.restart_in])
    return markdown(rows) if len(rows) > 1 else ""


@dataclasses.dataclass(frozen=True)
class Target:
    """What was to be reached, and what was; ``met`` is None where it was not measured."""

    text: str
    reached: str
    met: bool | None


def targets(found: Mapping[tuple[str, str], Cell], titles: Mapping[str, str]) -> list[Target]:
    """What OnlineQuant must reach in each workflow."""
    goals: list[Target] = []
    for workflow in dict.fromkeys(workflow for workflow, _ in found):
        base, compiled, ours = (found.get((workflow, variant), Cell()) for variant in VARIANTS)
        model, title = WORKFLOWS[workflow].model, titles[workflow]
        for other, name, least in (
            (base, TITLES["baseline"], {"sdxl": 70, "sd15": 60, "svd": 50}[model]),
            (compiled, TITLES["compiled"], {"sdxl": 50, "sd15": 45, "svd": 30}[model]),
        ):
            text = f"{title}: later prompts at least {least}% less than {name}"
            goals.append(_target(text, ours.later, other.later, lambda a, b: 100 * (1 - a / b), "{:.0f}%", least))
        if model == "sdxl":
            text = f"{title}: sampler at least 2.5x as fast as with {TITLES['compiled']}"
            goals.append(_target(text, ours.sampler, compiled.sampler, lambda a, b: b / a, "{:.2f}x", 2.5))
        text = f"{title}: first prompt after a restart in at most 30 s"
        goals.append(_at_most(text, ours.restart, 30.0, "{:.1f} s"))
        most = None
        if base.first_sampler is not None and ours.trace is not None:
            most = 1.15 * base.first_sampler + ours.trace
        text = f"{title}: sampler of the first prompt at most 1.15x the baseline's and Dynamo's trace"
        limit = "" if most is None else f" ({seconds(most)})"
        goals.append(_at_most(text + limit, ours.first_sampler, most, "{:.1f} s"))
        text = f"{title}: a float step while it compiles at most 1.3x as long as before"
        slower = None
        if ours.step_before and ours.step_during:
            slower = ours.step_during / ours.step_before
        goals.append(_at_most(text, slower, 1.3, "{:.2f}x"))
    return goals


def _target(text: str, ours: float | None, other: float | None, by: Any, form: str, least: float) -> Target:
    if not ours or not other:
        return Target(text, "not run", None)
    value = by(ours, other)
    return Target(text, form.format(value), value >= least)


def _at_most(text: str, value: float | None, most: float | None, form: str) -> Target:
    if value is None or most is None:
        return Target(text, "not run", None)
    return Target(text, form.format(value), value <= most)


def targets_table(goals: Iterable[Target]) -> str:
    verdicts = {True: "yes", False: "NO", None: ""}
    rows = [[goal.text, goal.reached, verdicts[goal.met]] for goal in goals]
    return markdown([["target", "reached", "met"], *rows])


def lora_targets(records: Iterable[Record], workflow: str, title: str) -> list[Target]:
    """What changes of a LoRA may cost OnlineQuant; none where they were not run."""
    groups = [group for label, group in _changes(records, workflow).items() if label.startswith("lora")]
    pairs = [(group["quantized"], group["baseline"]) for group in groups if {"quantized", "baseline"} <= {*group}]
    if not pairs:
        return []
    more = max(ours["seconds"] - base["seconds"] for ours, base in pairs)
    traces = sum(ours["traces"] for ours, _ in pairs)
    return [
        _at_most(f"{title}: a change of a LoRA at most 1 s more than in the baseline", more, 1.0, "{:+.2f} s"),
        _at_most(f"{title}: traces for changes of a LoRA", traces, 0, "{:.0f}"),
    ]


def changes_table(records: Iterable[Record], workflow: str) -> str:
    """One row for each change, in the order in which they were run; empty where there are none."""
    prompts = _changes(records, workflow)
    variants = [variant for variant in VARIANTS if any(variant in group for group in prompts.values())]
    headings = ["change", *(TITLES[variant] for variant in variants)]
    ours = "more than the baseline, sampler, traces, compiles, then compiled for, drawn in, latent error, PSNR"
    rows = [[*headings, *(ours.split(", ") if "quantized" in variants else ())]]
    for label, group in prompts.items():
        row = [label.partition(": ")[2], *(seconds(group.get(variant, {}).get("seconds")) for variant in variants)]
        if "quantized" in variants:
            row += _costs(group.get("quantized"), group.get("baseline"))
        rows.append(row)
    return markdown(rows) if prompts else ""


def _changes(records: Iterable[Record], workflow: str) -> dict[str, dict[str, Record]]:
    """The prompts of a workflow's changes, by label and variant; of each, the last one."""
    prompts: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["what"] == "prompt" and record["part"] == "change" and record["workflow"] == workflow:
            prompts.setdefault(record["label"], {})[record["variant"]] = record
    return prompts


def _costs(ours: Record | None, base: Record | None) -> list[str]:
    """What a change costs OnlineQuant."""
    if ours is None:
        return [""] * 8
    more = "" if base is None else f"{ours['seconds'] - base['seconds']:+.1f} s"
    waited = "not done" if ours["waited"] is None else seconds(ours["waited"])
    return [
        more,
        seconds(ours["sampler"]),
        str(ours["traces"]),
        str(ours["compiles"]),
        waited if ours["waited"] != 0 else "",
        drawn_in(ours),
        _number(ours.get("error"), "{:.3f}"),
        _number(ours.get("psnr"), "{:.1f} dB"),
    ]


def drawn_in(prompt: Record) -> str:
    """In how many of its steps a prompt was in 8 bit."""
    steps, quantized = prompt["steps"], prompt["steps_in_8_bit"]
    if quantized in (0, steps):
        return "8 bit" if quantized else "float"
    return f"8 bit in {quantized} of {steps} steps"


def trouble_lines(records: Iterable[Record]) -> Iterator[str]:
    """Tracebacks, warnings and deaths in the logs of all servers, and what was not run."""
    found = list(records)
    logs = [record for record in found if record["what"] == "server"]
    tracebacks = [(record["server"], text) for record in logs for text in record["tracebacks"]]
    warnings = [(record["server"], text) for record in logs for text in record["warnings"]]
    died = [record["server"] for record in logs if record["died"]]
    yield (
        f"{len(logs)} servers: {len(tracebacks)} tracebacks, {len(warnings)} warnings of onlinequant, "
        f"{len(died)} ended by themselves."
    )
    for server, text in dict.fromkeys([*tracebacks, *warnings]):
        yield f"- {server}: {text}"
    for server in died:
        yield f"- {server}: ended by itself"
    parts = {record["text"]: record for record in found if record["what"] in ("done", "not run")}  # of each the last
    for text, record in parts.items():
        if record["what"] == "not run":
            yield f"- not run: {text}: {record['reason'].splitlines()[0][:200]}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned in plain text, too; all but the first are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        texts = [
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(texts) + " |")
    rule = [("-" * (width - 1) + ":") if index else "-" * width for index, width in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def seconds(value: float | None) -> str:
    """With as many places as are worth reading."""
    if value is None:
        return ""
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def _gigabytes(mebibytes: int | None) -> str:
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def in_short(result: dict[str, Any]) -> str:
    """One line for whoever watches."""
    parts = [f"{result['status']}, {seconds(result['seconds'])}, sampler {seconds(result['sampler'])}"]
    parts += [f"{name} {result[name]}" for name in ("traces", "recompiles", "compiles") if result[name]]
    parts += [f"trace {result['trace_seconds']:.1f} s"] if result["trace_seconds"] else []
    for phase in ("calibrating", "compiling", "quantized"):
        step = step_ms([result], phase)
        parts += [f"{phase} step {step:.0f} ms"] if step else []
    parts += [f"waited {result['waited']:.1f} s"] if result.get("waited") else []
    parts += [f"{result['peak_mib']} MiB"] if result["peak_mib"] else []
    parts += [f"error {result['error']:.4f}"] if "error" in result else []
    parts += [f"{result['psnr']:.1f} dB"] if "psnr" in result else []
    parts += [f"{graph['phase']} {graph['quantized']}/{graph['layers']}" for graph in result["graphs"]]
    return ", ".join(parts)


def show(records: list[dict[str, Any]]) -> None:
    """All tables."""
    names = dict.fromkeys(record["workflow"] for record in records if "workflow" in record)
    is_tiny = any(record["tiny"] for record in records)
    titles = {name: (WORKFLOWS[name].made_tiny() if is_tiny else WORKFLOWS[name]).title for name in names}
    found = cells(records)
    if found:
        print("\n" + main_table(found, titles))
        if cold := cold_table(found, titles):
            print(f"\nA cold start of OnlineQuant:\n\n{cold}")
    for name, title in titles.items():
        if changes := changes_table(records, name):
            print(f"\n{title}, changes:\n\n{changes}")
    goals = targets(found, titles)
    goals += [goal for name, title in titles.items() for goal in lora_targets(records, name, title)]
    if goals:
        print("\n" + targets_table(goals))
    print("\n" + "\n".join(trouble_lines(records)), flush=True)
