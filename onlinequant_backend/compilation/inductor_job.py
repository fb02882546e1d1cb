"""One compile by Inductor, identical in the process that needs it and in another one that compiles beforehand."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..best_effort import best_effort
from ..cache import source_digest
from ..kernels.nvidia import precompile
from ..torch_internals import dynamo_interface, inductor_interface, torch_settings
from ..torch_internals.fake_tensors import new_fake_mode
from . import graph_transport
from .compile_process import WorkFailedError, done_elsewhere, is_wanted
from .symbolic_inputs import Symbol, symbolic_sizes

_log = logging.getLogger("onlinequant")


class NotNowError(Exception):
    """The compile failed now, but may succeed another time."""


class ModelMovedError(NotNowError):
    """The compile failed because the model was moved."""


class NotInCacheError(NotNowError):
    """The compile would take long, and the caller does not wait for it."""


class Job(NamedTuple):
    """The input of one Inductor compile.

    Attributes:
        graph: a rewritten graph, as ``graph_transport.standard`` makes it.
        inputs: a fake tensor, a symbolic size or a number for each of its inputs.
        symbols: the symbolic sizes among them.
        options: of Inductor.
        directory: for its caches; None means their default place.
        device: the device on which the graph runs.
        name: a digest of all that the result depends on.
        has_regions: whether the graph has subgraphs that it calls more than once.
    """

    graph: fx.GraphModule
    inputs: Sequence[Any]
    symbols: tuple[Symbol, ...]
    options: dict[str, Any]
    directory: Path | None
    device: torch.device
    name: str
    has_regions: bool = False


def compile_job(job: Job, fake_mode: FakeTensorMode) -> Callable[..., Any]:
    """Compile, or load the result from the cache. ``fake_mode``: of the inputs."""
    with _compilation(fake_mode, bool(job.symbols)), caches_in(job.directory), precompile.compiling_ahead(job.device):
        try:
            compiled = inductor_interface.compile_fx(job.graph, list(job.inputs), job.options, outside_dynamo=True)
        except Exception:
            inductor_interface.forget_loaded_code()  # some of it may be damaged
            raise
    _write(_note(job, "compiled"))
    return compiled


def is_in_cache(job: Job) -> bool:
    """Whether ``compile_job`` has been done in this directory before, by any process."""
    note = _note(job, "compiled")
    return note is not None and note.exists()


def holds_code(directory: Path) -> bool:
    """Whether anything has been compiled in this directory before, as a whole or in parts."""
    return any(path.is_dir() for path in directory.glob("*"))


def refuse(job: Job) -> None:
    """Record that it cannot be compiled, since a failed compile takes as long as a successful one."""
    _write(_note(job, "refused"))


def is_refused(job: Job) -> bool:
    """Whether any process has recorded that it cannot be compiled."""
    note = _note(job, "refused")
    return note is not None and note.exists()


def _write(note: Path | None) -> None:
    if note is not None:
        # The directory may have been deleted meanwhile, with all that was compiled.
        with best_effort("cannot write %s", note), contextlib.suppress(FileNotFoundError):
            note.touch()


def _note(job: Job, what: str) -> Path | None:
    return None if job.directory is None else job.directory / f"{what}-{job.name}"


def job_name(graph: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> str:
    """A digest of all that a job's result depends on, including this process's settings and this package's sources."""
    modules = [module for _, module in sorted(graph.named_modules()) if isinstance(module, fx.GraphModule)]
    kinds = [(type(x).__name__, graph_transport.kind(x)) if isinstance(x, torch.Tensor) else str(x) for x in inputs]
    settings = sorted((name, repr(value)) for name, value in options.items()), torch_settings.settings()
    known = repr(([str(module.graph) for module in modules], kinds, settings, source_digest.source_digest()))
    return hashlib.sha256(known.encode()).hexdigest()[:32]


def compile_elsewhere(job: Job) -> bool:
    """Whether another process has compiled it, so that ``compile_job`` will find the result in the cache. Raises
    WorkFailedError if a graph in regions cannot be compiled."""
    if not is_wanted():
        return False
    try:
        data = graph_transport.dumps(tuple(job))
    except graph_transport.NotPortableError as error:
        _log.info("this process compiles itself, since no other one can: %s", error)
        return False
    try:
        return done_elsewhere(compile_packed, job.symbols, data)
    except WorkFailedError as error:
        if job.has_regions:  # it will be compiled as a whole
            raise
        _log.info("this process tries what another one could not compile: %s", error)
        return False


def compile_packed(symbols: Sequence[Symbol], data: bytes) -> None:
    """Compile in this process for another one, which will find the result in the cache."""
    shape_env = ShapeEnv(duck_shape=False) if symbols else ShapeEnv()
    fake_mode = new_fake_mode(shape_env)
    compile_job(Job(*graph_transport.loads(data, fake_mode, symbolic_sizes(shape_env, symbols))), fake_mode)


@contextlib.contextmanager
def caches_in(directory: Path | None) -> Iterator[None]:
    """Within the block, Inductor's caches are in ``directory``, and their keys include this package's sources: by
    themselves they include only the names of its operators."""
    with inductor_interface.inductor_cache(directory, tag=source_digest.source_digest()):
        yield


@contextlib.contextmanager
def _compilation(fake_mode: FakeTensorMode, is_symbolic: bool) -> Iterator[None]:
    """The context that Inductor needs outside Dynamo: a tracing context of its own (without one its caches are
    bypassed), and ordinary tensors even under ``inference_mode``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(dynamo_interface.compile_lock())
        stack.enter_context(dynamo_interface.others_call_uncompiled())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(tracing(TracingContext(fake_mode)))
        if is_symbolic:
            stack.enter_context(inductor_interface.free_sizes())
        yield
