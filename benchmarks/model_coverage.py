"""How many layers of the real SD1.5, SDXL and SVD go into 8 bit by density alone, and why not the others.

    python benchmarks/model_coverage.py --models sd15 sdxl svd --dtype float16

The full models go through Dynamo and all passes on the meta device: shapes without values, so it takes no memory.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.models import GPU_THRESHOLDS, MODELS, build
from onlinequant_backend.config import QuantConfig
from onlinequant_backend.graph import LayerInfo, fx_utils, layer_nodes
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.passes import ANALYZE, OBSERVE, REWRITE, PassContext, run_passes


def analyzed_layers(model: torch.nn.Module, inputs: dict[str, Any], config: QuantConfig) -> list[LayerInfo]:
    """Take a model's Dynamo graphs through every pass; returns what was decided about each layer."""
    context = PassContext(config, Precision("int8", "asked for"))
    layers: list[LayerInfo] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        analyzed = fx_utils.copy_graph(graph_module)
        run_passes(analyzed, ANALYZE, context)
        run_passes(fx_utils.copy_graph(analyzed), OBSERVE, context)
        rewritten = fx_utils.copy_graph(analyzed)
        changes = run_passes(rewritten, REWRITE, context)
        found = [info for _, info in layer_nodes(analyzed)]
        assert changes["rewrite_linear"] + changes["rewrite_conv"] == sum(info.quantized for info in found)
        layers.extend(found)
        return graph_module

    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    return layers


def summary(name: str, layers: list[LayerInfo]) -> list[str]:
    """One row of the table."""
    row = [name, f"{sum(info.flops for info in layers) / 1e12:.2f}"]
    for kind in ("conv", "linear"):
        mine = [info for info in layers if info.kind == kind]
        refused = sum(info.reason.startswith("density") for info in mine)
        quantized = sum(info.quantized for info in mine)
        row += [str(len(mine)), str(refused), str(len(mine) - refused - quantized), str(quantized)]
    share = sum(info.flops for info in layers if info.quantized) / sum(info.flops for info in layers)
    return [*row, f"{share:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sd15", "sdxl", "svd"], choices=MODELS)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    table = Table(title=f"{options.dtype}, batch {options.batch}, thresholds 100 (conv) and 300 (linear)")
    headings = ["model", "TFLOP"]
    for kind in ("convs", "linears"):
        headings += [kind, "too thin", "other reasons", "8 bit"]
    for heading in [*headings, "FLOPs in 8 bit"]:
        table.add_column(heading, justify="right")
    for name in options.models:
        model, inputs = build(name, "meta", getattr(torch, options.dtype), options.batch)
        layers = analyzed_layers(model, inputs, QuantConfig(**GPU_THRESHOLDS))
        table.add_row(*summary(name, layers))
        reasons = Counter(re.sub(r"density \d+", "density", info.reason) for info in layers if not info.quantized)
        for reason, count in reasons.most_common():
            print(f"{name}: {count} stay in float: {reason}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
