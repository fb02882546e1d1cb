"""FX passes, one per file. Each is ``(graph_module, context) -> int``, the number of nodes it changed. The tuples below
list the passes of each stage in order: ``ANALYZE`` for a traced graph, ``OBSERVE`` for the copy that is observed,
``SELECT`` after observing, and ``REWRITE`` for the copy that becomes the 8-bit graph.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch.fx as fx

from .annotate_density import annotate_density
from .attend_to_one_key import attend_to_one_key
from .context import PassContext
from .drop_identities import drop_identities
from .drop_unused_inputs import drop_unused_inputs
from .find_attention import find_attention
from .functionalize import functionalize
from .fuse_channel_add import fuse_channel_add
from .fuse_geglu import fuse_geglu
from .fuse_group_norm import fuse_group_norm
from .fuse_layer_norm import fuse_layer_norm
from .insert_observers import insert_observers
from .keep_output_layout import keep_output_layout
from .keep_views import keep_views
from .merge_linears import merge_linears
from .name_layers import name_layers
from .outline_regions import outline_regions
from .quantize_inputs import quantize_inputs
from .rewrite_attention import rewrite_attention
from .rewrite_conv import rewrite_conv
from .rewrite_linear import rewrite_linear
from .scale_outputs import scale_outputs
from .select_nodes import select_nodes
from .share_activations import share_activations
from .stream_weights import stream_weights

__all__ = ["ANALYZE", "OBSERVE", "REWRITE", "SELECT", "PassContext", "run_passes"]

Pass = Callable[[fx.GraphModule, PassContext], int]

ANALYZE: tuple[Pass, ...] = (
    functionalize,
    attend_to_one_key,
    scale_outputs,
    share_activations,
    name_layers,
    annotate_density,
    select_nodes,
    find_attention,
)
OBSERVE: tuple[Pass, ...] = (insert_observers, stream_weights)
SELECT: tuple[Pass, ...] = (select_nodes,)
REWRITE: tuple[Pass, ...] = (
    quantize_inputs,
    rewrite_linear,
    rewrite_conv,
    rewrite_attention,
    drop_identities,
    fuse_group_norm,
    fuse_layer_norm,
    fuse_channel_add,
    merge_linears,
    fuse_geglu,
    keep_views,
    keep_output_layout,
    drop_unused_inputs,
    outline_regions,
)

_log = logging.getLogger("onlinequant")


def run_passes(graph_module: fx.GraphModule, passes: Sequence[Pass], context: PassContext) -> dict[str, int]:
    """Run ``passes`` in order; returns how many nodes each changed. The graph is linted and recompiled once."""
    changes: dict[str, int] = {}
    for run in passes:
        start = time.perf_counter()
        changes[run.__name__] = run(graph_module, context)
        _log.debug(
            "%s changed %d nodes in %.1f ms", run.__name__, changes[run.__name__], 1e3 * (time.perf_counter() - start)
        )
    graph_module.graph.lint()
    graph_module.recompile()
    return changes
