"""One step of real denoisers on an NVIDIA GPU in float16: eager, torch.compile, torchao and onlinequant side by side.

    python benchmarks/gpu_step.py --rows sdxl-1024-b2 sd15-512-b2 --json results.jsonl --profile

Every cell (a row's model at its size, in one column) is a process of its own, all on one machine; all make the same
random weights and inputs from the same seed. One after the other, each alone on the GPU, they are measured; with
``--together`` those of a row, torchao's after the others, compile at the same time before that, which disturbs only
"first s" and saves minutes. Times are medians with their spread.

- "direct": wall-clock time of a call as a user makes it, in batches of calls that are synchronized at their end.
- "as a graph": the same function captured by hand in one CUDA graph, between CUDA events around each replay. For
  torch.compile and torchao that is the fastest they can do; eager's is for information only: its users have no graph.
  onlinequant replays graphs of its own, so for it the events go around batches of direct calls.
- Speed-ups of a line are of its time as a graph (eager's: of its direct calls), over torch.compile as a graph,
  torch.compile called directly, eager called directly, and torchao as a graph.
- "relative error": ``||result - eager|| / ||eager||`` of the step's output.
- "GiB": the peak of allocated and of reserved memory in timed calls. What a CUDA graph needs for intermediate results
  is sure to be in the second number only.
- "first s": seconds from the first call to the first compiled result, for onlinequant with the observed calls. Caches
  are empty. "first GiB": the peaks of memory meanwhile.

"torchao" is what its documentation recommends for float8 on such a GPU: dynamic scales for activations, one for each
tensor (one for each row needs bfloat16), in every linear layer whose sizes are multiples of 16, with the options it
sets for Inductor (``--torchao-untuned``: without, which compiles in half the time). "torchao large linears" leaves out
the layers that diffusers' SDXL tutorial leaves out. Both are compiled in torch.compile's default mode, since
max-autotune takes many minutes a model.

Kernels are counted in a trace of the profiler. ``--profile`` lists them one by one, too. ``--show FILE`` prints the
tables of what several runs have appended to a file; it needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.cells import Cell, caches, key_and_value, say
from benchmarks.gpu_step_cell import COLUMNS, EAGER, OURS, ROWS, TORCHAO, TORCHAO_LARGE, measure
from benchmarks.gpu_step_tables import read, show
from benchmarks.gpu_timing import require_cuda


def cell_of(row: str, column: str, options: argparse.Namespace, folder: Path) -> tuple[Cell, bool]:
    """The process of a cell, and whether its caches were filled by an earlier run."""
    name = re.sub(r"\W+", "-", f"{row}-{options.small_depth}-{column}-{options.torchao_untuned}")
    home = (options.cache or folder / "caches") / name
    is_warm = home.exists() and column != EAGER
    arguments = ["--row", row, "--column", column, "--folder", str(folder)]
    for name in ("calls", "repeats", "small_depth"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("profile", "together", "torchao_untuned"):
        arguments += [f"--{name.replace('_', '-')}"] * getattr(options, name)
    for key, value in options.option:
        arguments += ["--option", f"{key}={json.dumps(value)}"]
    return Cell(__file__, arguments, caches(home, column == OURS), options.timeout, enough="direct"), is_warm


def cells_of(row: str, options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cells of a row by column, as they are finished, each from a fresh process."""
    columns = sorted(set(options.columns), key=COLUMNS.index)
    if importlib.util.find_spec("torchao") is None:
        for column in {TORCHAO, TORCHAO_LARGE}.intersection(columns):
            columns.remove(column)
            yield column, {"failed": "torchao is not installed"}
    slow = [column for column in columns if column in (TORCHAO, TORCHAO_LARGE)]  # others would wait for minutes
    quick = [column for column in columns if column not in slow]
    for together in filter(None, (quick, slow)) if options.together else [[column] for column in columns]:
        print(f"measuring {row}: {', '.join(together)}", file=sys.stderr, flush=True)
        cells = {column: cell_of(row, column, options, folder) for column in together}
        if options.together:
            for cell, _ in cells.values():
                cell.wait_until_ready()
        for column, (cell, is_warm) in cells.items():
            yield column, {**cell.finish(), "warm": is_warm}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = [column for column in COLUMNS if column != TORCHAO_LARGE]
    result.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    result.add_argument("--columns", nargs="+", default=defaults, choices=COLUMNS)
    result.add_argument("--json", type=Path, help="append each cell to this file, as one line, when it is finished")
    result.add_argument("--show", type=Path, help="print what --json wrote to this file, and measure nothing")
    result.add_argument("--profile", action="store_true", help="list the kernels, too")
    result.add_argument("--timeout", type=float, default=420, help="seconds for one cell")
    result.add_argument("--together", action="store_true", help="compile the columns of a row at the same time")
    result.add_argument("--calls", type=int, default=10, help="calls of a batch")
    result.add_argument("--repeats", type=int, default=5, help="batches; 3 if they take long")
    result.add_argument("--small-depth", type=int, default=10, help="transformer layers of SDXL's deepest blocks")
    result.add_argument("--option", action="append", default=[], type=key_and_value, help="key=value for onlinequant")
    result.add_argument("--torchao-untuned", action="store_true", help="without the Inductor options torchao sets")
    result.add_argument("--cache", type=Path, help="keep the caches in this folder and find them there again")
    result.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    result.add_argument("--column", choices=COLUMNS, help=argparse.SUPPRESS)
    result.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return result


def main() -> None:
    options = parser().parse_args()
    if options.row:
        measure(options)
        return
    console = Console(width=190)
    if options.show:
        for title, measured in read(options.show).items():
            show(console, title, measured)
        return
    require_cuda()
    with tempfile.TemporaryDirectory() as name:
        for row in options.rows:
            cells: dict[str, dict[str, Any]] = {}
            depth = f", depth {options.small_depth}" if options.small_depth != 10 and row.startswith("sdxl") else ""
            title = f"{ROWS[row].title}{depth}, float16"
            for column, cell in cells_of(row, options, Path(name)):
                cells[column] = cell
                brief = {key: value for key, value in cell.items() if key not in ("profile", "kernels")}
                say(json.dumps(brief))
                if options.json:
                    line = {"title": title, "row": row, "column": column, **cell}
                    line["options"] = dict(options.option) if column == OURS else {}
                    with options.json.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            show(console, title, dict(sorted(cells.items(), key=lambda item: COLUMNS.index(item[0]))))


if __name__ == "__main__":
    main()
