"""What a model's weights take, before and after ``free_float_weights=True`` gives up those that have 8-bit copies.

    python benchmarks/memory_cpu.py

The full SD1.5 UNet in bfloat16, which takes what float16 does, at a small latent image, since only the weights count.
Inductor's place is taken by running the rewritten graph as it is: a compile would take minutes and change nothing here.
"Resident" is the whole process's memory above what it was before the model was made.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
import onlinequant_backend
from benchmarks.models import build, relative_error
from onlinequant_backend.torch_internals import inductor_interface


def resident() -> int:
    """Bytes of this process in memory, once what was freed has been given back."""
    gc.collect()
    with contextlib.suppress(OSError):  # another libc, which keeps what it likes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def stored(model: torch.nn.Module) -> int:
    """Bytes of the memory that a model's parameters point to, each counted once."""
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    inductor_interface.compile_fx = lambda module, _inputs, _options, **_: module  # type: ignore[assignment]
    torch.nn.Linear(64, 64, dtype=torch.bfloat16)(torch.zeros(64, 64, dtype=torch.bfloat16))  # loads oneDNN
    before = resident()
    model, inputs = build("sd15", "cpu", torch.bfloat16, batch=1)
    inputs["sample"] = inputs["sample"][..., :16, :16].contiguous()
    floats, in_floats = stored(model), resident() - before
    expected = model(**inputs)[0]
    options = {"precision": "int8", "calibration_steps": 1, "free_float_weights": True}
    options |= {"conv_compute_density_threshold": 0, "linear_compute_density_threshold": 0}
    step = torch.compile(model, backend="onlinequant", options=options)
    step(**inputs)
    result = step(**inputs)[0]
    report = onlinequant_backend.reports()[-1]
    eight_bit = sum(torch.Size(d.weight_shape).numel() for d in report.decisions if d.quantized)
    table = Table(title="SD1.5 UNet, weights in bfloat16; GB")
    for heading in ("", "float weights", "8-bit weights", "together", "of float", "resident", "of float"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = (("float", floats, 0, in_floats), ("freed", stored(model), eight_bit, resident() - before))
    for name, float_bytes, int_bytes, process in rows:
        both = float_bytes + int_bytes
        cells = (float_bytes, int_bytes, both, both / floats * 1e9, process, process / in_floats * 1e9)
        table.add_row(name, *(f"{cell / 1e9:.2f}" for cell in cells))
    console = Console(width=120)
    console.print(table)
    console.print(f"{sum(d.quantized for d in report.decisions)} of {len(report.decisions)} layers in 8 bit, ", end="")
    console.print(f"relative error of a step {relative_error(result, expected):.4f}, {report.phase}")


if __name__ == "__main__":
    main()
