"""A report as plain text."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..console import SIMPLE_HEAD

if TYPE_CHECKING:
    from .decision import NodeDecision
    from .report import Report

_WIDTH = 120
_NAME_WIDTH = 38
_WIDEST = "compiled in"  # of the summary's titles


def render_table(report: Report) -> str:
    """A summary, one row a layer, and how often each reason for float occurs; 120 columns, but for the file's path."""
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None, markup=False, highlight=False)
    console.print(_summary(report))
    lines = [_trimmed(text.getvalue())]
    if report.stats_path is not None:  # in one piece, to be copied
        lines.append(f"{'statistics':<{len(_WIDEST)}}  {report.stats_path}")
    standings = tuple(map(report.standing, report.decisions))
    return "\n".join([*lines, *_layers(tuple(report.decisions), standings)])


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def _summary(report: Report) -> Table:
    observed = f"{report.calls_observed} of {report.calibration_steps} calls"
    if not report.calls_observed and report.phase != "calibrating":
        observed = "before, with other options or at another size"
    grid = Table.grid(padding=(0, 2))
    grid.add_row("model", report.model)
    is_under_way = report.phase == "calibrating" and report.calls_observed
    grid.add_row("phase", _because(report.phase, "" if is_under_way else report.phase_reason))
    grid.add_row("precision", _because(report.precision, report.precision_reason))
    grid.add_row("layers", report.headline())
    grid.add_row("observed", observed + (", decisions from the cache" if report.cache_hit else ""))
    grid.add_row(_WIDEST, f"{report.compile_seconds:.1f} s")
    if report.error is not None:
        grid.add_row("error", f"{report.error:.3g} of a step")
    for warning in report.warnings():
        grid.add_row("warning", warning)
    if report.widened:
        for title, factors, values in (
            ("widened", [factor for factor in report.widened.values() if factor > 1], "larger"),
            ("narrowed", [1 / factor for factor in report.widened.values() if factor < 1], "far smaller"),
        ):
            if factors:
                grid.add_row(
                    title, f"the ranges of {len(factors)} layers, by up to {max(factors):.2g}x, for {values} values"
                )
    if report.unmatched():
        grid.add_row("exclude", f"{', '.join(map(repr, report.unmatched()))}: no layer has such a name")
    for column, meaning in _legend(report):
        grid.add_row(column, meaning)
    return grid


def _legend(report: Report) -> Iterator[tuple[str, str]]:
    """What the short titles of columns mean."""
    if report.decisions:
        yield "FLOP/B", "compute density: floating-point operations per byte moved"
    if any(decision.sensitivity is not None for decision in report.decisions):
        whose = "the layer's output" if report.sensitivity_kind == "local" else "the model's output"
        yield "sens.", f"sensitivity: the relative error of {whose} if this layer runs in 8 bit"


def _because(what: str, reason: str) -> str:
    return f"{what}: {reason}" if reason else what


@functools.lru_cache(maxsize=8)
def _layers(decisions: tuple[NodeDecision, ...], standings: tuple[str, ...]) -> tuple[str, ...]:
    """The rows, and why layers stay in float: kept, since a model has hundreds of layers and few changes of mind."""
    if not decisions:
        return ()
    outcomes = [(each, standing, _reason(each, standing)) for each, standing in zip(decisions, standings, strict=True)]
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None, markup=False, highlight=False)
    console.print(_rows(outcomes))
    return "", _trimmed(text.getvalue()), "", *_float_reasons(outcomes)


def _reason(decision: NodeDecision, standing: str) -> str:
    # What was chosen could not be compiled.
    return "the model is in float" if standing == "float" and decision.quantized else decision.reason


def _rows(outcomes: Iterable[tuple[NodeDecision, str, str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("input", no_wrap=True)
    table.add_column("FLOP/B", justify="right", no_wrap=True)
    table.add_column("sens.", justify="right", no_wrap=True)
    table.add_column("in", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for decision, standing, reason in outcomes:
        table.add_row(
            _folded(decision.name),
            decision.kind,
            "x".join(map(str, decision.shape)),
            f"{decision.density:.4g}",
            "-" if decision.sensitivity is None else f"{decision.sensitivity:.3g}",
            standing,
            reason,
        )
    return table


def _folded(name: str) -> str:
    """``name`` on lines that end at a dot, so that no word of it is torn."""
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        if lines[-1] and len(lines[-1]) + len(part) > _NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _common(values: tuple[str, ...]) -> str:
    return values[0] if len(set(values)) == 1 else "..."


def _float_reasons(outcomes: Iterable[tuple[NodeDecision, str, str]]) -> list[str]:
    """How many layers stay in float for each reason; reasons that differ only in their numbers count as one."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for _, standing, reason in outcomes:
        if standing == "float":
            parts = re.split(r"(\d+(?:\.\d+)?)", reason)
            groups.setdefault(tuple(parts[::2]), []).append(parts)
    lines = [
        f"{len(members):5}  " + "".join(_common(values) for values in zip(*members, strict=True))
        for members in sorted(groups.values(), key=len, reverse=True)
    ]
    return ["why layers stay in float:", *lines] if lines else []
