"""How far whole pictures drawn in 8 bit are from the float model's: same captions, same noise, full sampling runs.

    python benchmarks/fidelity.py --model scenes --out fidelity
    python benchmarks/fidelity.py --model scenes --sampler euler dpm++2m --pictures 256 --device cuda --dtype float16
    python benchmarks/fidelity.py --model sdxl-small --outliers --pictures 4 --steps 8 --out fidelity-small
    python benchmarks/fidelity.py --no-inductor --pictures 16 --steps 10 --out fidelity-quick
    python benchmarks/fidelity.py --variant "int8, ends in float" '{"precision": "int8", "exclude": ["conv_*"]}'

Rows: eager, the reference; torch.compile in the same dtype, which is the noise floor; int8 with each calibration method
and fp8, which has but one; and "per token", which is torchao's dynamic quantization of linear layers, see
``per_token.py``. onlinequant observes one run with the first of the samplers, of other captions and other noise, and
then draws with all of them.

- "layers": in 8 bit, of those there are. On a CPU ``--threshold`` is 0, so that all are; on a GPU the default decides.
- "step": ``||variant - eager|| / ||eager||`` of one step in the middle of a run, from the same latents.
- "result": the same of what was drawn, of all pictures together: latents, or pictures (scenes).
- "PSNR", "worst": mean and least of all pictures, in dB, their values in [0, 1]; "SSIM": the mean.
- "accuracy" (scenes): the share of what the captions ask for that a judge finds in the pictures.
- "Frechet" (scenes): distance of the pictures' features from those of the float pictures; 0 where they are equal.
- "s": seconds that observing, compiling and drawing took, not a benchmark of speed.

No LPIPS: its networks' weights would have to be downloaded. Models with random weights ("sd15", "sdxl", "sdxl-small",
"svd") have no pictures: three fixed mixtures of their latents' channels stand in for them. What their errors grow to in
a run says nothing about trained models, where each step also corrects the one before: compare rows, not models.
On CPUs fp8 is emulated, exactly but slowly, and int8 weights have 7 bits without VNNI. Compiling takes minutes a row
there; ``--no-inductor`` runs the same 8-bit arithmetic op by op instead, and leaves out torch.compile.

``--jobs`` lets that many rows draw at the same time, each in a process of its own.

``--outliers`` puts outliers into the model first (``outliers.py``). ``--out`` is a folder for sheets of pictures,
``fidelity.json``, and everyone's results: what is there already is not drawn again. Delete it after changing code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.fidelity_study import Row, Study, file_name
from benchmarks.fidelity_subjects import SAMPLERS, RandomWeights, Scenes, Subject
from benchmarks.fidelity_variants import COMPILED, EAGER, Variant, variants, without_inductor
from benchmarks.models import UNETS
from onlinequant_backend.cache import atomic_files
from onlinequant_backend.config import CALIBRATION_METHODS, QuantConfig

# Heading of each column, and how its figures are written.
_COLUMNS = {
    "layers": "{}",
    "step": "{:.5f}",
    "result": "{:.4f}",
    "PSNR": "{:.2f}",
    "worst": "{:.2f}",
    "SSIM": "{:.4f}",
    "accuracy": "{:.4f}",
    "Frechet": "{:.4f}",
    "s": "{:.0f}",
}


def table(title: str, rows: dict[str, Row]) -> Table:
    """One sampler's rows; columns that nobody has are left out."""
    result = Table(title=title)
    result.add_column("", no_wrap=True)
    headings = [heading for heading in _COLUMNS if any(heading in row for row in rows.values())]
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        result.add_row(
            name, *(_COLUMNS[heading].format(row[heading]) if heading in row else "" for heading in headings)
        )
    return result


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = list(dict.fromkeys(["minmax", QuantConfig().calibration_method]))
    result.add_argument("--model", default="scenes", choices=["scenes", *UNETS])
    result.add_argument("--outliers", action="store_true", help="put outliers into the model")
    result.add_argument("--device", default="cpu")
    result.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    result.add_argument("--size", type=int, nargs=2, help="height and width of the latents, of random-weight models")
    result.add_argument("--sampler", nargs="+", default=["euler"], choices=SAMPLERS)
    result.add_argument("--steps", type=int, default=20)
    result.add_argument("--pictures", type=int, default=64)
    result.add_argument("--batch", type=int, default=8, help="pictures drawn at a time, and observed")
    result.add_argument("--precision", nargs="*", default=["int8", "fp8"], choices=["int8", "fp8"])
    result.add_argument("--method", nargs="+", default=methods, choices=CALIBRATION_METHODS)
    result.add_argument("--threshold", type=float, help="of compute density, for both kinds of layers")
    result.add_argument("--variant", nargs=2, action="append", default=[], metavar=("NAME", "JSON"), help="a row more")
    result.add_argument("--no-inductor", action="store_true", help="run 8-bit graphs op by op, without compiling them")
    result.add_argument("--jobs", type=int, default=1, help="rows that are drawn at the same time")
    result.add_argument("--out", type=Path, default=Path("fidelity"))
    result.add_argument("--row", help=argparse.SUPPRESS)
    return result


def subject_of(options: argparse.Namespace) -> Subject:
    dtype = getattr(torch, options.dtype)
    if options.model == "scenes":
        return Scenes(options.device, dtype, options.batch, options.outliers)
    size = tuple(options.size) if options.size else None
    return RandomWeights(options.model, options.device, dtype, options.batch, size, options.outliers)


def variants_of(options: argparse.Namespace) -> list[Variant]:
    threshold = 0.0 if options.threshold is None and options.device == "cpu" else options.threshold
    chosen: dict[str, Any] = {}
    if threshold is not None:
        names = ("conv_compute_density_threshold", "linear_compute_density_threshold")
        chosen = {"selection": "density", **dict.fromkeys(names, threshold)}
    found = variants(options.precision, options.method, chosen)
    for name, text in options.variant:
        more = json.loads(text)
        found.append(Variant(name, "ours", more.pop("precision", "auto"), {**chosen, **more}))
    return [variant for variant in found if not (options.no_inductor and variant == COMPILED)]


def open_folder(options: argparse.Namespace) -> None:
    """Make the folder, or make sure that what is in it was drawn as now."""
    names = ("model", "outliers", "device", "dtype", "size", "steps", "pictures", "batch", "threshold", "no_inductor")
    settings = {name: getattr(options, name) for name in names}
    path = options.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{options.out} holds pictures drawn with other settings: give another --out, or delete it.")
    atomic_files.write_atomically(path, json.dumps(settings) + "\n")  # rows in other processes may be reading it


def draw_at_once(rows: list[str], jobs: int) -> None:
    """Draw so many rows at a time, each in a process of its own, eager before all others."""

    def draw(row: str) -> None:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", row], check=True)

    draw(EAGER.name)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(draw, rows))


def main() -> None:
    options = parser().parse_args()
    if options.pictures % options.batch:
        raise SystemExit("--pictures must be a multiple of --batch: a smaller batch at the end would be compiled, too.")
    open_folder(options)
    chosen = variants_of(options)
    if options.jobs > 1 and options.row is None:
        draw_at_once([variant.name for variant in chosen], options.jobs)
    study = Study(subject_of(options), options.sampler, options.steps, options.pictures, options.out)
    with without_inductor() if options.no_inductor else contextlib.nullcontext():
        for variant in chosen:
            if options.row in (None, variant.name):
                study.run(variant)
    if options.row is not None:
        return
    made = {sampler: {variant.name: study.row(variant, sampler) for variant in chosen} for sampler in options.sampler}
    for sampler, rows in made.items():
        study.save_sheet(options.out / f"{file_name(sampler)}.png", [v for v in chosen if v.is_shown], sampler)
        outliers = ", with outliers" if options.outliers else ""
        title = f"{options.model}{outliers}, {options.dtype} on {options.device}, {sampler}, {options.steps} steps"
        Console(width=150).print(table(f"{title}, {options.pictures} pictures", rows))
    text = json.dumps(made, indent=2).replace("Infinity", "null")  # for which JSON has no number
    (options.out / "fidelity.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
