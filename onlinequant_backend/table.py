"""A report as plain text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .report import NodeDecision, Report

_WIDTH = 120
_NAME_WIDTH = 38


def render_table(report: Report) -> str:
    """A summary, one row a layer, and how often each reason for float occurs; 120 columns."""
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None, markup=False, highlight=False)
    console.print(_summary(report))
    if report.decisions:
        console.print()
        console.print(_layers(report.decisions))
        console.print()
    console.print(_float_reasons(report.decisions))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def _summary(report: Report) -> Table:
    counts = report.counts()
    layers = [f"{counts[f'quantized_{kind}']} of {counts[f'candidates_{kind}']} {kind}" for kind in ("conv", "linear")]
    observed = f"{report.calls_observed} of {report.calibration_steps} calls"
    grid = Table.grid(padding=(0, 2))
    grid.add_row("model", report.model)
    grid.add_row("phase", _because(report.phase, report.phase_reason))
    grid.add_row("precision", _because(report.precision, report.precision_reason))
    grid.add_row("in 8 bit", ", ".join(layers))
    grid.add_row("observed", observed + (", decisions from the cache" if report.cache_hit else ""))
    grid.add_row("compiled in", f"{report.compile_seconds:.1f} s")
    if report.error is not None:
        grid.add_row("error", f"{report.error:.3g} of a step, measured when observing was over")
    if report.widened:
        most = max(report.widened.values())
        grid.add_row("widened", f"the ranges of {len(report.widened)} layers, by up to {most:.2g}x, for larger values")
    if report.stats_path is not None:
        grid.add_row("statistics", report.stats_path)
    return grid


def _because(what: str, reason: str) -> str:
    return f"{what}: {reason}" if reason else what


def _layers(decisions: Iterable[NodeDecision]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("input", no_wrap=True)
    table.add_column("FLOP/B", justify="right", no_wrap=True)
    table.add_column("sens.", justify="right", no_wrap=True)
    table.add_column("in", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for decision in decisions:
        table.add_row(
            _folded(decision.name),
            decision.kind,
            "x".join(map(str, decision.shape)),
            f"{decision.density:.4g}",
            "-" if decision.sensitivity is None else f"{decision.sensitivity:.3g}",
            "8 bit" if decision.quantized else "float",
            decision.reason,
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


def _float_reasons(decisions: Iterable[NodeDecision]) -> str:
    """How many layers stay in float for each reason; reasons that differ only in their numbers count as one."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for decision in decisions:
        if not decision.quantized:
            parts = re.split(r"(\d+(?:\.\d+)?)", decision.reason)
            groups.setdefault(tuple(parts[::2]), []).append(parts)
    lines = [
        f"{len(members):5}  " + "".join(_common(values) for values in zip(*members, strict=True))
        for members in sorted(groups.values(), key=len, reverse=True)
    ]
    return "\n".join(["why layers stay in float:", *lines]) if lines else ""
