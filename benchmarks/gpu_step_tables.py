"""The tables of ``gpu_step``: times, speed-ups and memory, and what the kernels of a step are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_kernels import CATEGORIES
from benchmarks.gpu_step_cell import COLUMNS, COMPILED, EAGER, TORCHAO


def median(cell: dict[str, Any], name: str) -> float | None:
    """Milliseconds of a cell's "direct" or "graph"."""
    return float(cell[name]["median"]) if name in cell else None


def table(title: str, cells: dict[str, dict[str, Any]]) -> Table:
    """The columns of one row of ``ROWS``, one a line."""
    result = Table(title=title)
    headings = ["", "direct ms (min-max)", "as a graph ms (min-max)", "to compile's graph", "to compile", "to eager"]
    headings += ["to torchao", "relative error", "GiB", "first s", "first GiB", "triton_*", "launches", "8-bit layers"]
    for heading in headings:
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for column, cell in cells.items():
        if "failed" in cell:
            result.add_row(column, cell["failed"])
            continue
        mine = median(cell, "direct" if column == EAGER else "graph")
        ratios = []
        for base, name in ((COMPILED, "graph"), (COMPILED, "direct"), (EAGER, "direct"), (TORCHAO, "graph")):
            theirs = median(cells.get(base, {}), name)
            ratios.append("" if mine is None or theirs is None else f"{theirs / mine:.2f}x")
        counts, report = cell.get("kernels", {}), cell.get("report", {})
        result.add_row(
            column,
            shown(cell.get("direct")),
            shown(cell.get("graph")),
            *ratios,
            "" if column == EAGER else f"{cell['relative_error']:.4f}",
            shown_memory(cell.get("memory")),
            "" if column == EAGER else f"{cell['first_seconds']:.0f}" + (" warm" if cell.get("warm") else ""),
            shown_memory(cell.get("first_memory")),
            str(counts.get("distinct_triton", "")),
            f"{counts['launches']:.0f}" if counts else "",
            f"{report['layers']} {report['precision']}" if report else "",
        )
    return result


def shown(times: dict[str, float] | None) -> str:
    if times is None:
        return ""
    digits = 1 if times["median"] >= 100 else 2
    return f"{times['median']:.{digits}f} ({times['low']:.{digits}f}-{times['high']:.{digits}f})"


def shown_memory(peaks: dict[str, float] | None) -> str:
    return "" if peaks is None else f"{peaks['allocated']:.2f} / {peaks['reserved']:.2f}"


def category_table(title: str, cells: dict[str, dict[str, Any]]) -> Table:
    """Milliseconds and launches of each category of kernels, for each column that was traced."""
    traced = {column: cell["kernels"] for column, cell in cells.items() if "kernels" in cell}
    result = Table(title=f"{title}: ms of a step's kernels, and launches")
    result.add_column("")
    for column in traced:
        result.add_column(column, justify="right")
    for name in CATEGORIES:
        groups = [counts["categories"][name] for counts in traced.values()]
        result.add_row(name, *(f"{group['ms']:.2f}  {group['launches']:5.0f}" for group in groups))
    result.add_section()
    result.add_row("all", *(f"{counts['ms']:.2f}  {counts['launches']:5.0f}" for counts in traced.values()))
    result.add_row("distinct kernels", *(str(counts["distinct"]) for counts in traced.values()))
    return result


def top_table(title: str, rows: list[dict[str, Any]], count: int = 25) -> Table:
    """The kernels that take longest."""
    result = Table(title=title)
    for heading in ("ms", "share", "launches", "mean us", "category", "kernel"):
        result.add_column(heading, justify="left" if heading in ("category", "kernel") else "right", no_wrap=True)
    total = sum(row["ms"] for row in rows)
    for row in rows[:count]:
        name = row["name"].removeprefix("void ")
        result.add_row(
            f"{row['ms']:.3f}",
            f"{row['ms'] / total:.1%}",
            f"{row['launches']:.0f}",
            f"{row['mean_us']:.1f}",
            row["category"],
            name if len(name) <= 110 else f"{name[:70]}...{name[-37:]}",
        )
    return result


def show(console: Console, title: str, cells: dict[str, dict[str, Any]]) -> None:
    """Everything about one row of ``ROWS``."""
    console.print(table(title, cells))
    for column, cell in cells.items():
        for note in cell.get("notes", ()):
            console.print(f"{column}: {note}", markup=False, highlight=False)
        if cell.get("report", {}).get("phase") == "float":
            console.print(f"{column} ran in float: {cell['report']['phase_reason']}", markup=False, highlight=False)
    if any("kernels" in cell for cell in cells.values()):
        console.print(category_table(title, cells))
    for column, cell in cells.items():
        if "profile" in cell:
            console.print(top_table(f"{title}: {column}", cell["profile"]))


def read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The cells that ``--json`` wrote, by title and column: of each the last that did not fail, if there is one."""
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        cells = tables.setdefault(cell["title"], {})
        if "failed" not in cell or "failed" in cells.get(cell["column"], {"failed": ""}):
            cells[cell["column"]] = cell
    return {
        title: dict(sorted(cells.items(), key=lambda item: COLUMNS.index(item[0]))) for title, cells in tables.items()
    }
