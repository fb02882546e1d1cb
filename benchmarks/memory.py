"""What real denoisers take of an NVIDIA GPU's memory, phase by phase: eager, torch.compile, torchao and onlinequant.

    python benchmarks/memory.py --rows sd15 sdxl --json memory.jsonl
    python benchmarks/memory.py --rows svd flux wan --no-second-size --json memory.jsonl
    python benchmarks/memory.py --rows flux --columns "onlinequant half" --capped 16
    python benchmarks/memory.py --show memory.jsonl

Every cell (a model in one column) is a process of its own with empty caches, alone on the GPU. All have the same random
weights and inputs, made on the GPU and moved to the host before anything is measured. FLUX.1 and Wan are in bfloat16,
all others in float16. "torchao" is that of ``gpu_step``. "onlinequant half" keeps the float weights in the host's
memory.

- "load": the model comes from the host's memory onto the GPU, and torchao quantizes it.
- "observe": onlinequant's calls in float.
- "compile": up to the first compiled result, onlinequant's in 8 bit. Of eager it is the first call.
- "run": 10 calls.
- "LoRA": changes of rank 16 are added in place to the weights of all attention projections, and 2 calls are made; then
  they are subtracted again, with 2 more calls. "LoRA s" and "removed s" last until the first result after the change.
- "second size": 3 calls at about half the height. "2nd size s" is the first of them.

Before each phase, cached memory without a tensor is given back, so a peak is the phase's own. "allocated" and
"reserved" are the peaks of torch's allocator. "process" is what the GPU's memory in use grew by, looked at every 5 ms,
with CUDA's context: according to NVML if ``pynvml`` is installed, else to CUDA itself, with nvidia-smi for the time
before the process began. "host" is the process's resident memory. A phase in which memory runs out, or anything else
fails, is the last one of its cell; only a LoRA that cannot be added to torchao's weights is passed over.

- "relative error": ``||result - eager|| / ||eager||`` of the step's output.
- "weights after": the largest difference between a weight before the LoRA and after it, rounding included.

``--jobs N`` measures N cells at a time. That takes less time, but then seconds are not worth much, and "process" is not
known. ``--capped GB`` lets torch's allocator have so many GiB. ``--show FILE`` prints the tables of what runs have
appended to a file; it needs no GPU. ``--device cpu --tiny`` tries the script with small models.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.cells import Cell, caches, key_and_value, say
from benchmarks.gpu_step_cell import OURS, TORCHAO
from benchmarks.gpu_timing import require_cuda
from benchmarks.memory_cell import COLUMNS, HALF, ROWS, measure
from benchmarks.memory_tables import read, show


def cell_of(row: str, column: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One cell, measured by a fresh process."""
    if column == TORCHAO and importlib.util.find_spec("torchao") is None:
        return {"failed": "torchao is not installed"}
    arguments = ["--row", row, "--column", column, "--folder", str(folder), "--device", options.device]
    for name in ("tiny", "torchao_untuned"):
        arguments += [f"--{name.replace('_', '-')}"] * getattr(options, name)
    arguments += ["--side-by-side"] * (options.jobs > 1)
    arguments += ["--no-second-size"] * (not options.second_size)
    arguments += ["--capped", str(options.capped)] * bool(options.capped)
    for key, value in options.option:
        arguments += ["--option", f"{key}={json.dumps(value)}"]
    home = folder / "caches" / re.sub(r"\W+", "-", f"{row}-{column}")
    return Cell(__file__, arguments, caches(home, column in (OURS, HALF)), options.timeout).finish()


def measured(row: str, column: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """As ``cell_of``; says so, and keeps the cell in the ``--json`` file."""
    say(f"measuring {row}: {column}")
    cell = cell_of(row, column, options, folder)
    say(json.dumps(cell))
    if options.json:
        line = {"title": title_of(row, options), "row": row, "column": column, **cell}
        line["options"] = dict(options.option) if column in (OURS, HALF) else {}
        with options.json.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return cell


def title_of(row: str, options: argparse.Namespace) -> str:
    """What a row's tables are called."""
    kind = str(ROWS[row].dtype).removeprefix("torch.")
    capped = f", at most {options.capped:g} GiB" if options.capped else ""
    return f"{row}, tiny" if options.tiny else f"{ROWS[row].title}, {kind}{capped}"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    result.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    result.add_argument("--json", type=Path, help="append each cell to this file, as one line, when it is finished")
    result.add_argument("--show", type=Path, help="print what --json wrote to this file, and measure nothing")
    result.add_argument("--capped", type=float, metavar="GB", help="GiB that torch's allocator may take of the GPU")
    result.add_argument("--no-second-size", dest="second_size", action="store_false", help="leave out the last phase")
    result.add_argument("--timeout", type=float, default=600, help="seconds for one cell")
    result.add_argument("--option", action="append", default=[], type=key_and_value, help="key=value for onlinequant")
    result.add_argument("--torchao-untuned", action="store_true", help="without the Inductor options torchao sets")
    result.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    result.add_argument("--tiny", action="store_true", help="small models, for trying the script")
    result.add_argument("--jobs", type=int, default=1, help="how many cells are measured at a time")
    result.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    result.add_argument("--column", choices=COLUMNS, help=argparse.SUPPRESS)
    result.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    result.add_argument("--side-by-side", action="store_true", help=argparse.SUPPRESS)
    return result


def main() -> None:
    options = parser().parse_args()
    console = Console(width=190)
    if options.show:
        for title, cells in read(options.show).items():
            show(console, title, cells)
        return
    if options.device == "cuda":
        require_cuda()
    if options.row:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        columns = sorted(set(options.columns), key=COLUMNS.index)
        rows = {
            row: {column: pool.submit(measured, row, column, options, Path(name)) for column in columns}
            for row in options.rows
        }
        for row, cells in rows.items():
            show(console, title_of(row, options), {column: cell.result() for column, cell in cells.items()})


if __name__ == "__main__":
    main()
