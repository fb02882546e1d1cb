"""Which cheap measure of a layer's sensitivity puts layers in the order that the model's own error puts them.

    python benchmarks/sensitivity.py --model scenes
    python benchmarks/sensitivity.py --model sd15 --size 32 32
    python benchmarks/sensitivity.py --model sdxl-small --precision fp8 --every 4

The truth is ``sensitivity="end_to_end"``: the squared error of the model's output with one layer alone in 8 bit, for
which the model runs once for each layer. All other measures come from one run, but for the gradient's backward pass.

- "mean error / mean output" is what ``sensitivity="local"`` is.
- "share of the residual sum": of the squares, where a layer's error is first added to what it had no part in.
- "squared gradient": of a random mixture of the model's outputs, with respect to the layer's output; this is what
  ``sensitivity="gradient"`` is.
- "conv", "linear", "all": Spearman's correlation of a measure with the truth; 1 where both order the layers alike.
- "left": of the squared errors that all layers cause, the percentage that is left if a fifth of the layers, those that
  a measure finds most sensitive, stay in float. The last row is the least that is possible.

"scenes" is a trained model at half of a sampling run; the others have random weights. A second table lists the layers
that cause most of the error, in truth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.fidelity_study import Recorder
from benchmarks.fidelity_subjects import Scenes
from benchmarks.models import MODELS, build
from benchmarks.outliers import enlarge_channels
from benchmarks.sensitivity_measures import Measures, Observed, measure

_TRUTH = "the model's error (end_to_end)"
_STEPS = 10


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """The correlation of the ranks."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(ranks.corrcoef()[0, 1])


def left(guess: torch.Tensor, truth: torch.Tensor) -> float:
    """The share of all errors that is left without the fifth of the layers that ``guess`` finds worst."""
    return float(truth[guess.argsort()[: len(guess) - len(guess) // 5]].sum() / truth.sum())


def table(title: str, kinds: Mapping[str, str], found: Measures, truth: Mapping[str, float]) -> Table:
    """One row a measure. ``kinds``: "conv" or "linear", by layer."""
    result = Table(title=title)
    result.add_column("")
    for heading in ("conv", "linear", "all", "left"):
        result.add_column(heading, justify="right")
    groups = [[name for name in truth if kinds[name] == kind] for kind in ("conv", "linear")]
    groups.append(list(truth))
    for measure_name in [*next(iter(found.values())), _TRUTH]:
        cells = []
        for names in groups:
            true = torch.tensor([truth[name] for name in names])
            guess = true if measure_name == _TRUTH else torch.tensor([found[name][measure_name] for name in names])
            cells.append(f"{spearman(guess, true):.2f}")
        result.add_row(measure_name, *cells, f"{left(guess, true):.1%}")
    return result


def worst(truth: Mapping[str, float], count: int = 8) -> Table:
    """The layers that cause most of the error, and how much of it."""
    result = Table("layer", "of all errors")
    for name in sorted(truth, key=lambda name: -truth[name])[:count]:
        result.add_row(name, f"{truth[name] / sum(truth.values()):.1%}")
    return result


def model_and_call(options: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model and one call of it."""
    dtype = getattr(torch, options.dtype)
    if options.model == "scenes":
        subject = Scenes(options.device, dtype, batch=2, outliers=options.outliers)
        recorder = Recorder(subject.model, _STEPS // 2)
        list(subject.sample(recorder, 0, 2, "euler", _STEPS))
        args, kwargs = recorder.kept
        return subject.model, {
            **dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)),
            **kwargs,
        }
    size = tuple(options.size) if options.size else None
    model, inputs = build(options.model, options.device, dtype, batch=1, size=size)
    if options.outliers:
        enlarge_channels(model)
    return model, inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes", choices=["scenes", *MODELS])
    parser.add_argument("--size", type=int, nargs=2, help="height and width of the latents, of random-weight models")
    parser.add_argument("--outliers", action="store_true", help="put outliers into the model, see outliers.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--precision", default="int8", choices=["int8", "fp8"])
    parser.add_argument("--every", type=int, default=1, help="measure the truth for one layer of so many")
    options = parser.parse_args()
    model, inputs = model_and_call(options)
    observed = Observed(model, inputs, {"precision": options.precision})
    found = measure(observed)
    truth = observed.end_to_end(options.every)
    kinds = {info.name: info.kind for info in observed.infos}
    name = f"{options.model}{', with outliers' if options.outliers else ''}"
    title = f"{name}, {options.precision}, {options.dtype} on {options.device}: {len(truth)} layers"
    Console(width=100).print(table(title, kinds, found, truth), worst(truth))


if __name__ == "__main__":
    main()
