"""What reading saved 8-bit weights (``save_weights``) costs, and what quantizing the same weights costs.

    python benchmarks/saved_weights.py --formats onednn int8 fp8
    python benchmarks/saved_weights.py --device cuda --dtype float16 --formats fp8

The weights are linear ones, of random values, of the sizes that SDXL has. "checksums" is the part of reading that
compares the float weights with those that the file was made of. The file is in the memory of the operating system.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from onlinequant_backend.cache import weights_store
from onlinequant_backend.cache.cache_store import Cache
from onlinequant_backend.kernels import formats
from onlinequant_backend.quantization import saved_weights
from onlinequant_backend.quantization.saved_weights import SavedCopy, Source
from onlinequant_backend.quantization.weight_copy import Copy

FORMATS = {"onednn": formats.ONEDNN, "int8": formats.INT8, "fp8": formats.FP8}
SIZES = {(640, 640): 40, (1280, 1280): 60, (10240, 1280): 12, (1280, 5120): 12}
KEY = "a" * 64


def copy_all(sources: Sequence[Source], saved: Mapping[int, SavedCopy]) -> None:
    """Make 8-bit copies of all weights, and wait for them."""
    copies = []
    for position, source in enumerate(sources):
        copies.append(Copy(None, source.format))
        copies[-1].requantize(source.weight, None, saved.get(position))
    if sources[0].weight.is_cuda:
        torch.cuda.synchronize()


def matching(cache: Cache, sources: Sequence[Source]) -> dict[int, SavedCopy]:
    """What is saved of the weights; raises RuntimeError unless it is all of them."""
    file = weights_store.load(cache, KEY)
    found = {} if file is None else saved_weights.matching(file, sources)
    if len(found) < len(sources):
        raise RuntimeError("not all weights were saved")
    return found


def read_all(cache: Cache, sources: Sequence[Source]) -> None:
    """Make 8-bit copies of all weights by reading them."""
    copy_all(sources, matching(cache, sources))


def seconds(function: Callable[[], object], rounds: int = 5) -> float:
    """The least of some rounds, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--formats", nargs="+", default=["onednn", "fp8"], choices=FORMATS)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    weights = [torch.randn(size, dtype=dtype, device=options.device) for size, n in SIZES.items() for _ in range(n)]
    gigabytes = sum(weight.nbytes for weight in weights) / 1e9
    table = Table(title=f"{len(weights)} weights, {gigabytes:.2f} GB of {options.dtype}, {options.device}; seconds")
    for heading in ("", "quantizing", "reading", "of it checksums", "saving"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in options.formats:
        sources = [Source(f"layer{i}", weight, FORMATS[name], None) for i, weight in enumerate(weights)]
        with tempfile.TemporaryDirectory() as folder:
            cache = Cache.open(folder)
            start = time.perf_counter()
            outline = [source.outline() for source in sources]
            weights_store.publish(cache, KEY, "", outline, saved_weights.made(sources))
            saving = time.perf_counter() - start
            quantizing = seconds(functools.partial(copy_all, sources, {}))
            reading = seconds(functools.partial(read_all, cache, sources))
            checksums = seconds(functools.partial(matching, cache, sources))
            table.add_row(name, *(f"{each:.2f}" for each in (quantizing, reading, checksums, saving)))
    Console().print(table)


if __name__ == "__main__":
    main()
