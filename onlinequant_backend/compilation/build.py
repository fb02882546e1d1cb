"""From a selection of layers to a compiled 8-bit graph: rewrites a copy and compiles it with Inductor."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..analysis.traced_graph import TracedGraph
from ..cache.cache_store import emptied
from ..graph import fx_utils, specialization
from ..passes import REWRITE, PassContext, run_passes
from ..quantization.weight_set import WeightSet
from . import graph_transport, region_check
from .compiled_graph import CompiledGraph
from .cuda_graphs import GraphedCall
from .inductor_job import Job, NotNowError, compile_job, holds_code, is_refused, job_name, refuse
from .symbolic_inputs import FixedInputs, SymbolicInputs

_log = logging.getLogger("onlinequant")

# What Inductor says of regions that are called with tensors of different strides. No damaged file is the cause.
_INCONSISTENT = "subgraph args must have consistent values"


class _JobError(Exception):
    """``job`` cannot be compiled in its directory, because of ``error``."""

    def __init__(self, job: Job, error: Exception) -> None:
        self.job, self.error = job, error


class _Inputs(NamedTuple):
    """The inputs of a rewritten graph.

    Attributes:
        taken: the positions of the first ones among a call's arguments.
        extras: those that rewriting has added.
        moved: positions in ``taken`` of CPU tensors that are passed on the GPU.
        examples: fake tensors for all of them.
    """

    taken: list[int]
    extras: list[torch.Tensor]
    moved: list[int]
    examples: list[Any]


def build(
    traced: TracedGraph,
    args: Sequence[Any],
    weights: WeightSet,
    symbolic: bool,
    directory: Path | None,
    beforehand: Callable[[Job], object] = lambda job: None,
) -> CompiledGraph:
    """Rewrite the selected layers of a copy of the graph and compile it.

    ``symbolic``: for all sizes that Dynamo left open, or only for those of ``args``. ``directory``: for Inductor's
    caches; None means their default place. Files in it may be damaged, so a failed compile is tried once more in an
    empty one. If it is no longer writable, a temporary directory is used. A graph that cannot be compiled in regions is
    compiled in other ones, or at last as a whole. ``beforehand`` is called with the job, and may have another process
    compile it first.
    """
    whole = dataclasses.replace(traced, config=dataclasses.replace(traced.config, regional_compilation=False))
    # Computing the strides takes seconds, and those of the traced graph are right for most models.
    ways = [(traced, False, "in other regions"), (traced, True, "as a whole"), (whole, False, "")]
    while True:
        graph, has_strides, then = ways.pop(0)
        attempt = functools.partial(
            _build, graph, args, weights, symbolic, beforehand=beforehand, has_strides=has_strides
        )
        try:
            return _build_anywhere(attempt, directory)
        except _JobError as failure:
            job, error = failure.job, failure.error
        if not job.has_regions:
            raise error
        refuse(job)
        _log.info("compiling %s, since regions cannot be compiled: %s: %s", then, type(error).__name__, error)


def _build_anywhere(attempt: Callable[[Path | None], CompiledGraph], directory: Path | None) -> CompiledGraph:
    """``attempt(directory)``, or an attempt in another or empty directory if this one may be the cause of an error."""
    held_code = directory is not None and holds_code(directory)
    try:
        return attempt(directory)
    except _JobError as failure:
        job, error = failure.job, failure.error
        if directory is None:
            raise
        if not _can_be_written(directory):
            _log.warning("compiling in a temporary directory, since %s cannot be written: %s", directory, error)
            return attempt(Path(_temporary_directory().name))
        if not held_code or _INCONSISTENT in str(error) or is_refused(job):
            raise
        _log.warning("compiling in an empty directory, since what %s holds may be damaged: %s", directory, error)
        try:
            with emptied(directory):
                return attempt(directory)
        except _JobError:
            refuse(job)  # the directory was not damaged
        except OSError as obstacle:
            # On Windows, while code that was loaded from it is in use.
            _log.warning("compiling in a temporary directory, since %s cannot be emptied: %s", directory, obstacle)
            return attempt(Path(_temporary_directory().name))
        raise


def _build(
    traced: TracedGraph,
    args: Sequence[Any],
    weights: WeightSet,
    symbolic: bool,
    directory: Path | None,
    beforehand: Callable[[Job], object],
    has_strides: bool,
) -> CompiledGraph:
    """``has_strides``: the rewritten graph's strides are computed, on which its regions depend."""
    start = time.perf_counter()
    graph_module, config = traced.module, traced.config
    inputs = SymbolicInputs(graph_module, args) if symbolic else FixedInputs(args)
    rewritten = fx_utils.copy_graph(graph_module)
    specialization.specialize(rewritten, args, sizes=not symbolic)
    device = weights.layers[0].device
    context = PassContext(
        config,
        traced.precision,
        selection=weights.selection,
        device=device,
        smoothing=weights.smoothing(),
        merge=lambda indices: weights.merge(indices) is not None,
    )
    positions = {name: position for position, name in enumerate(traced.inputs.names)}

    def inputs_of(graph_module: fx.GraphModule) -> _Inputs:
        names = [node.name for node in fx_utils.placeholders(graph_module)]
        taken = [positions[name] for name in names if name in positions]
        extras = [weights.extra(what, of) for what, of in context.extra_inputs]
        moved = [i for i, at in enumerate(taken) if device.type == "cuda" and _is_cpu_number(inputs.values[at])]
        examples = [inputs.values[at] for at in taken]
        with inputs.fake_mode, torch.inference_mode(False):
            for i in moved:
                examples[i] = examples[i].to(device)
        return _Inputs(taken, extras, moved, [*examples, *graph_transport.fake_tensors(inputs.fake_mode, extras)])

    if has_strides:
        context.values = lambda graph_module: fx_utils.values(
            graph_module, inputs_of(graph_module).examples, inputs.fake_mode
        )
    has_regions = run_passes(rewritten, REWRITE, context)["outline_regions"] > 0
    taken, extras, moved, examples = inputs_of(rewritten)
    options = {"force_layout_optimization": True, **config.inductor_options()}
    graphed = None
    if traced.provider.captures_graphs:
        # Otherwise each LayerNorm computes a sum of residuals again from all of its terms.
        options.setdefault("realize_reads_threshold", 1)
        options["triton.cudagraphs"] = False  # this package's own replace them
        # The address of a quantized tensor does not show where its parts are.
        have_parts = any(map(is_traceable_wrapper_subclass, examples))
        if config.cuda_graphs and not have_parts and not any(map(fx_utils.writes_in_place, rewritten.graph.nodes)):
            fixed = [*(i in traced.inputs.parameters for i in taken), *(True for _ in extras)]
            graphed = functools.partial(GraphedCall, device=device, fixed=fixed)
    standard = graph_transport.standard(rewritten)
    name = job_name(standard, examples, options)
    job = Job(standard, examples, inputs.symbols, options, directory, device, name, has_regions)
    given = [*(args[at].to(device) if i in moved else args[at] for i, at in enumerate(taken)), *extras]
    reference = region_check.Reference(job.graph, given, options, directory) if has_regions else None
    try:
        if has_regions and is_refused(job):
            raise RuntimeError("compiling it in regions failed the last time")
        times = [start, time.perf_counter()]
        beforehand(job)
        times.append(time.perf_counter())
        function = compile_job(job, inputs.fake_mode)
        times.append(time.perf_counter())
        seconds = (after - before for before, after in itertools.pairwise(times))
        _log.debug("rewritten in %.1f s, compiled beforehand in %.1f s, by Inductor here in %.1f s", *seconds)
        if reference is not None:
            reference.check(function)
    except NotNowError:
        raise
    except Exception as error:
        raise _JobError(job, error) from error
    sizes = inputs if isinstance(inputs, SymbolicInputs) else None
    if sizes is not None:
        sizes.finish()
    return CompiledGraph(function, taken, context.extra_inputs, sizes, moved, graphed)


def _is_cpu_number(value: Any) -> bool:
    """For example a time step on the CPU: a CUDA graph would replay the value from its capture."""
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.numel() == 1


def _can_be_written(directory: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(2**20))
    except OSError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    # Deleted when the process exits, on Windows without the libraries that are still loaded.
    return tempfile.TemporaryDirectory(prefix="onlinequant-", ignore_cleanup_errors=True)
