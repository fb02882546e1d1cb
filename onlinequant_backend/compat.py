"""Everything that differs between the torch versions we support (2.11 to 2.13), in one place."""

from __future__ import annotations

import contextlib
import contextvars
import copyreg
import dataclasses
import enum
import functools
import importlib
import inspect
import operator
import os
import sys
import threading
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_origin

import torch
import torch._refs
from torch._C._dynamo.guards import GlobalStateGuard
from torch._dynamo import convert_frame, pgo
from torch._dynamo.callback import CallbackArgs, CallbackTrigger
from torch._dynamo.eval_frame import OptimizeContext
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.variables import builder
from torch._guards import TracingContext
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph as invoke_subgraph
from torch.utils.weak import WeakIdRef


class UnwrappedError(ShortenTraceback):
    """An error that Dynamo passes on to the user as it is, instead of as ``BackendCompilerFailed``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, first_useful_frame=None)


@functools.lru_cache(maxsize=1)
def has_gluon() -> bool:
    """Whether this Triton has Gluon as our kernel wants it. It is experimental, so other versions than those which the
    kernel was compiled with, 3.6 to 3.8, do not count."""
    try:
        import triton
        from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma  # noqa: F401
    except ImportError:
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return (3, 6) <= version < (3, 9)


class _Torch:
    """Pickles as the package, which does not pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("torch",)


def _named_in_torch(memory_format: torch.memory_format) -> tuple[Any, ...]:
    return getattr, (_Torch(), str(memory_format).removeprefix("torch."))


# Else pickle looks for it in whatever module was imported first: then the keys of Inductor's caches differ between two
# programs, and a graph that travels names a module of this program.
copyreg.pickle(torch.memory_format, _named_in_torch)


# What ``torch.tensor`` of numbers that are no constants has become in Dynamo's graphs.
tensor_of_numbers: Callable[..., torch.Tensor] = torch._refs.tensor


def hint(size: int | torch.SymInt) -> int:
    """The concrete size that Dynamo saw for a possibly symbolic ``size``."""
    if isinstance(size, int):
        return size
    node = size.node
    if getattr(node, "hint", None) is not None:
        return int(node.hint)
    return int(node.shape_env.size_hint(node.expr))


@dataclasses.dataclass(frozen=True)
class GlobalState:
    """What a graph computes depends on beside its inputs, and what Dynamo traces anew for when it changes.

    Attributes:
        guarded: all of that, as text: autocast, the default dtype, determinism, precision of products, threads.
        default_dtype: of new tensors.
        autocast: the dtype for each type of device that it is on for.
    """

    guarded: str
    default_dtype: torch.dtype
    autocast: dict[str, torch.dtype]

    @classmethod
    def now(cls) -> GlobalState:
        """As it is in this thread."""
        guard: Any = GlobalStateGuard()
        return cls(str(guard.__getstate__()), torch.get_default_dtype(), autocast_dtypes())

    @contextlib.contextmanager
    def autocasting(self) -> Iterator[None]:
        """Within the block autocast, which belongs to a thread and a ``with``, is on and off as it was."""
        with contextlib.ExitStack() as stack:
            for device in sorted({*self.autocast, *autocast_dtypes()}):
                is_on = device in self.autocast
                stack.enter_context(torch.autocast(device, dtype=self.autocast.get(device), enabled=is_on))
            yield


def autocast_dtypes() -> dict[str, torch.dtype]:
    """The dtype of autocast for each type of device that it is on for in this thread."""
    devices = torch._C._autocast_supported_devices()
    return {device: torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}


@dataclasses.dataclass(frozen=True, eq=False)
class Compilation:
    """One of Dynamo's, of a frame.

    Attributes:
        code: that the frame runs.
        owner: the module whose method that is, if it is one.
        backend: that it is for.
        is_first: whether Dynamo has never compiled this code before, or has forgotten it.
        scope: the frame's variables, by what Dynamo's guards call them.
    """

    code: types.CodeType
    owner: torch.nn.Module | None
    backend: Callable[..., Any]
    is_first: bool
    scope: dict[str, Any]

    @functools.cached_property
    def root(self) -> torch.nn.Module | None:
        """The model that the frame is a part of; None where that is not a module."""
        found = _outermost_module()  # which may be false, as a ModuleList without modules is
        return self.owner if found is None else found


def around_compilations(handler: Callable[[Compilation, Callable[[], Any]], Any]) -> None:
    """Have ``handler(compilation, compile)`` called instead of each of Dynamo's compilations from now on: it calls
    ``compile``, more than once if it wants to, and returns what that returns. Dynamo holds ``compile_lock`` then."""
    original = convert_frame._compile
    names = inspect.signature(original)

    @functools.wraps(original)
    def compile_frame(*args: Any, **kwargs: Any) -> Any:
        given = names.bind(*args, **kwargs).arguments
        owner = given["locals"].get("self")
        compilation = Compilation(
            code=given["code"],
            owner=owner if isinstance(owner, torch.nn.Module) else None,
            backend=given["compiler_fn"],
            is_first=given["compile_id"].frame_compile_id == 0,
            scope={"L": given["locals"], "G": given["globals"]},
        )
        return handler(compilation, lambda: original(*args, **kwargs))

    convert_frame._compile = compile_frame


def guarded_values(scope: Mapping[str, Any]) -> dict[str, Any]:
    """What a graph that Dynamo has just traced is for alone beside sizes, by Dynamo's name for where it comes from:
    flags and other constants, kinds of tensors, and the state of the process and the thread."""
    found: dict[str, Any] = {"": GlobalState.now()}
    for guard in TracingContext.get().guards_context.dynamo_guards:
        if guard.create_fn_name() not in _GUARDS_OF_VALUES or guard.name in found:
            continue
        with contextlib.suppress(Exception):  # not all names are expressions
            value = eval(guard.name, dict(scope))
            if isinstance(value, torch.Tensor):
                found[guard.name] = value.dtype, value.device, value.dim()
            elif isinstance(value, (bool, int, float, complex, str, bytes, type(None), enum.Enum)):
                found[guard.name] = type(value), value  # True equals 1
    return found


_GUARDS_OF_VALUES = {"CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "ID_MATCH", "TENSOR_MATCH"}


def innermost_backend(backend: Any) -> Any:
    """What ``backend`` was before torch wrapped it."""
    return _with_wrappers(backend)[-1]


def backend_key(backend: Any) -> tuple[Any, ...]:
    """Equal for what torch takes for the same backend with the same options."""
    *wrappers, innermost = _with_wrappers(backend)
    given = [getattr(wrapper, name, None) for wrapper in wrappers for name in ("kwargs", "keywords", "dynamic")]
    return id(innermost), repr(given)


def _with_wrappers(backend: Any) -> list[Any]:
    for name in ("_torchdynamo_orig_backend", "compiler_fn", "func"):
        if hasattr(backend, name):
            return [backend, *_with_wrappers(getattr(backend, name))]
    return [backend]


def _outermost_module() -> torch.nn.Module | None:
    """The module whose call, within ``torch.compile``, has led to what Dynamo is compiling in this thread."""
    found = None
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, OptimizeContext):
            return found
        if isinstance(caller, torch.nn.Module):
            found = caller
        frame = frame.f_back
    return None


def most_graphs() -> int:
    """How often Dynamo traces a function at most."""
    return int(torch._dynamo.config.recompile_limit)


def is_traced_too_often(error: BaseException) -> bool:
    """Whether Dynamo raises ``error`` because it has traced a function as often as it may."""
    return "recompile limit" in str(error) or "recompile_limit" in str(error)


def ends_in_break(graph_module: torch.fx.GraphModule) -> bool:
    """Whether Dynamo, which has made this graph, has more to trace than fits into it."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def watch_compilations(before: Callable[[str], None], after: Callable[[str], None]) -> bool:
    """Have ``before`` and ``after`` called with the frame's number around each of Dynamo's compilations from now on.

    Returns False if they are already; ``torch._dynamo.reset()`` forgets them.
    """
    handler = torch._dynamo.callback.callback_handler
    if any(getattr(callback, "_calls", None) is before for callback in handler.start_callbacks):
        return False
    handler.register_start_callback(_on_dynamo(before))
    handler.register_end_callback(_on_dynamo(after))
    return True


def _on_dynamo(function: Callable[[str], None]) -> Callable[[CallbackArgs], None]:
    def callback(args: CallbackArgs) -> None:
        if args.callback_trigger is CallbackTrigger.DYNAMO:
            function(str(args.compile_id).rpartition("/")[0].rpartition("/")[2])

    callback._calls = function  # type: ignore[attr-defined]
    return callback


def dynamo_settings(most_graphs: int) -> contextlib.AbstractContextManager[None]:
    """Dynamo traces a function up to ``most_graphs`` times, and does not search for garbage after that by itself."""
    settings: dict[str, Any] = {"recompile_limit": most_graphs}
    if hasattr(torch._dynamo.config, "run_gc_after_compile"):
        settings["run_gc_after_compile"] = False
    return cast("contextlib.AbstractContextManager[None]", torch._dynamo.config.patch(**settings))


class SeenSizes:
    """Which sizes Dynamo has seen of what: those that have changed it makes symbolic. At first it has seen none."""

    def __init__(self) -> None:
        self._state: Any = None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, which must hold ``compile_lock``, Dynamo knows of these and no others."""
        if self._state is None:
            self._state = defaultdict(pgo.CodeState)
        others, pgo._CODE_STATE = pgo._CODE_STATE, self._state
        try:
            yield
        finally:
            pgo._CODE_STATE = others


def are_shapes_static() -> bool:
    """Whether the user told ``torch.compile`` that there are to be no symbolic sizes."""
    return not torch._dynamo.config.automatic_dynamic_shapes


@contextlib.contextmanager
def static_tracing() -> Iterator[None]:
    """Dynamo makes no size symbolic."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True):
        yield


@contextlib.contextmanager
def symbolic_tracing(note: Callable[[], object]) -> Iterator[None]:
    """Dynamo makes every size of every input symbolic; ``note`` is called when it does.

    Whatever hangs on a module, such as a LoRA's strength, and other numbers stay so until they are seen to change.
    """
    original = builder.record_automatic_dynamic

    def record(tx: Any, name: str, tensor: torch.Tensor) -> Any:
        seen = original(tx, name, tensor)
        if not tensor.dim():
            return seen
        note()
        changed = (pgo.auto_dynamic,) * tensor.dim()
        return dataclasses.replace(seen, size=changed)

    builder.record_automatic_dynamic = record  # type: ignore[assignment]
    try:
        yield
    finally:
        builder.record_automatic_dynamic = original


@contextlib.contextmanager
def no_kernel_choice() -> Iterator[None]:
    """Tracing a convolution does not ask which kernel would run it: oneDNN looks at the batch, and that would become a
    guard (torch 2.11). Not for compiling."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextlib.contextmanager
def free_sizes(are_ones_free: bool = True) -> Iterator[None]:
    """Symbolic sizes that happen to be equal, or 1 if ``are_ones_free``, are not taken to be so always."""
    from torch.fx.experimental import _config

    patch: Any = _config.patch  # type: ignore[attr-defined]
    with patch(use_duck_shape=False, backed_size_oblivious=are_ones_free):
        yield


def cpu_flags() -> dict[str, bool]:
    """The 8-bit matrix instructions of this CPU: ``avx512_vnni``, ``avx_vnni``, ``amx_int8`` and ``avx2``."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "avx512_vnni": bool(torch.cpu._is_vnni_supported()),
        "avx_vnni": bool(capabilities.get("avx_vnni", False)),
        "amx_int8": bool(torch.cpu._is_amx_tile_supported()),
        "avx2": bool(torch.cpu._is_avx2_supported()),
    }


def int8_instructions() -> str | None:
    """The best of this CPU's instructions that sum 8-bit products in 32 bits; None if it has none."""
    flags = cpu_flags()
    return next((flag for flag in ("amx_int8", "avx512_vnni", "avx_vnni") if flags[flag]), None)


def clone_preserving_strides(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose memory is laid out alike, gaps and expanded dimensions included."""
    from torch._prims_common import clone_preserve_strides

    copy: torch.Tensor = clone_preserve_strides(tensor)
    return copy


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The Inductor options that ``torch.compile(mode=...)`` stands for; raises RuntimeError for an unknown mode."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def inductor_option_types() -> dict[str, type | None]:
    """What each of Inductor's options must be, by its name with underscores; None where torch does not check it."""
    from torch._inductor import config

    types: dict[str, type | None] = {}
    for name in config.get_config_copy():
        kind: Any = config.get_type(name)  # type: ignore[attr-defined]
        types[name.replace("-", "_")] = kind if isinstance(kind, type) and get_origin(kind) is None else None
    return types


class HarmlessReference(WeakIdRef):
    """A weak reference to a tensor that does not keep torch from swapping it: it goes on referring to the same object,
    whose content is another one then."""

    def __init__(self, tensor: torch.Tensor, callback: Callable[[Any], object]) -> None:
        super().__init__(tensor, callback)
        # The function looks this name up whenever it is called; its own may have been imported by others long ago.
        vars(torch.utils)["weakref"] = _weakref_without_harmless


_weakref_without_harmless = types.ModuleType("weakref")
_weakref_without_harmless.__dict__.update(vars(weakref))


def _getweakrefs(value: Any) -> list[Any]:
    return [reference for reference in weakref.getweakrefs(value) if not isinstance(reference, HarmlessReference)]


_weakref_without_harmless.getweakrefs = _getweakrefs  # type: ignore[attr-defined]


def is_transforming() -> bool:
    """Whether this thread is within a transform of ``torch.func``, whose tensors are wrappers without values."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def compile_lock() -> Any:
    """Dynamo's lock, a reentrant one: neither Dynamo nor Inductor compiles in two threads at once."""
    return torch._dynamo.convert_frame.compile_lock


@contextlib.contextmanager
def others_call_uncompiled() -> Iterator[None]:
    """Within the block, FX may trace in this thread, and calls of compiled models in other threads go on, uncompiled.

    While it traces, FX replaces ``torch.nn.Module.__call__`` for the whole process, so that Dynamo's guards fail in
    every thread. Dynamo asks whether FX is tracing and by default raises, where it may as well run the model as it is.
    """
    # The default, which holds in every thread. A patch would hold in this one alone (torch 2.13), and would leave
    # behind what it has found, to which no default applies any more.
    entry: Any = torch._dynamo.config._config["error_on_nested_fx_trace"]  # type: ignore[attr-defined]
    before, entry.default = entry.default, False
    tracer, me = torch.fx.Tracer, threading.get_ident()
    traced = tracer.call_module

    def call_module(self: Any, module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != me:  # no module of what is traced
            return forward(*args, **kwargs)
        return traced(self, module, forward, args, kwargs)

    tracer.call_module = call_module  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        tracer.call_module = traced  # type: ignore[method-assign]
        entry.default = before


def graph_module(root: Any, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """An ``fx.GraphModule`` whose Python code is made when it is first called. Most of ours never are, and SDXL's code
    takes a second."""
    try:
        from torch.fx._lazy_graph_module import _LazyGraphModule
    except ImportError:
        return torch.fx.GraphModule(root, graph)
    return _LazyGraphModule(root, graph)


def found_graphs() -> tuple[int, int]:
    """How many graphs Inductor has found in its cache in this process, and how many it has not."""
    counts = torch._dynamo.utils.counters["inductor"]
    return counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"] + counts["fxgraph_cache_bypass"]


def forget_loaded_code() -> None:
    """Have Inductor load what it has compiled from its caches on disk again. What runs already stays."""
    from torch._inductor.utils import clear_caches

    clear_caches()


@contextlib.contextmanager
def inductor_cache(directory: Path | None, tag: str) -> Iterator[None]:
    """Let Inductor keep its caches in ``directory``, and take ``tag`` for a part of what it compiles.

    None, or a place of the user's own choice in the environment, leaves them where they are.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from . import vector_instructions

    # Inductor writes the place that it has chosen into the environment too.
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        is_users = chosen is not None and Path(chosen) != Path(default_cache_dir()).absolute()
    except (KeyError, OSError):  # torch 2.11 needs the user's name for it, and there is none
        is_users = True
    _keep_kernel_cache()
    with _tagged(tag), contextlib.ExitStack() as stack:
        if directory is not None and not is_users:
            stack.enter_context(_environment("TORCHINDUCTOR_CACHE_DIR", str(directory)))
            stack.enter_context(vector_instructions.asked_once(directory))
        yield


def _tagged(tag: str) -> contextlib.AbstractContextManager[None]:
    """What is compiled depends on ``tag``, and AOTAutograd's cache, which saves tracing a graph twice more, takes more
    graphs than by default: also those with what is left of ``torch.nn.attention.sdpa_kernel``, which ComfyUI puts
    around every attention on a GPU. What that does depends on its arguments and on ``_SWITCHES``, both in the key.

    ``torch.compiler.config.cache_key_tag`` would not do: to Inductor's worker processes, which say where the fastest
    configuration of a kernel is saved, it is not known, so that none was found and each process measured again.
    """
    import torch._inductor.config as inductor_config

    names = ("_sdpa_kernel", "_sdpa_kernel_variadic", "_cur_sdpa_kernel_backends", "_backend_from_string")
    digest = f"{tag} {settings()[1]} {autocast_dtypes()}"
    known: dict[str, str] = inductor_config.unsafe_marked_cacheable_functions
    safe = {**known, **{f"torch.nn.attention.{name}": digest for name in names}}
    patched: Any = inductor_config.patch(unsafe_marked_cacheable_functions=safe)
    return cast("contextlib.AbstractContextManager[None]", patched)


def _keep_kernel_cache() -> None:
    """Have Triton's cache stay where it is: with the first kernel of its own, Inductor would move it to another folder,
    in which no other process, nor this one, finds the kernels of ours that are compiled already."""
    try:
        from triton import knobs
    except ImportError:
        return
    os.environ.setdefault("TRITON_CACHE_DIR", str(knobs.cache.dir))


# What a compile depends on beside its graph, and what another process must be told: the keys of Inductor's caches hold
# most of it.
_FLAGS = (
    "backends.cuda.matmul.allow_tf32",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_accumulation",
    "backends.cudnn.allow_tf32",
    "backends.cudnn.benchmark",
    "backends.cudnn.deterministic",
    # After the older ones for the same, and the general before the particular.
    "backends.fp32_precision",
    "backends.cudnn.fp32_precision",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.rnn.fp32_precision",
    "backends.cuda.matmul.fp32_precision",
    "backends.mkldnn.fp32_precision",
    "backends.mkldnn.conv.fp32_precision",
    "backends.mkldnn.rnn.fp32_precision",
    "backends.mkldnn.matmul.fp32_precision",
)
# What is asked for with the first function and set with the second one, and the order in which attention is tried.
_SWITCHES = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp,
    ),
    (torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order),
)
Settings = tuple[dict[str, Any], list[Any], list[dict[str, Any]]]
_held_settings: contextvars.ContextVar[Settings | None] = contextvars.ContextVar("onlinequant_settings", default=None)


@contextlib.contextmanager
def held_settings() -> Iterator[None]:
    """Within the block ``settings`` are what they are now. A step in float changes the order of attention's kernels at
    each layer in ComfyUI, for the whole process, and changes it back."""
    token = _held_settings.set(settings())
    try:
        yield
    finally:
        _held_settings.reset(token)


def settings() -> Settings:
    """What ``apply_settings`` takes in another process, so that it compiles the same: it must pickle."""
    held = _held_settings.get()
    if held is not None:
        return held
    flags = {name: value for name in _FLAGS if (value := _flag(name)) is not None}
    plain = (bool, int, float, str, type(None))
    configs = [
        {name: value for name, value in config.save_config_portable().items() if isinstance(value, plain)}
        for config in _configs()
    ]
    return flags, [ask() for ask, _ in _SWITCHES], configs


def _flag(name: str) -> Any:
    """A setting of torch's by its name; None where it cannot be told, since a newer one for the same is set."""
    try:
        return operator.attrgetter(name)(torch)
    except RuntimeError:
        return None


def apply_settings(settings: Settings) -> None:
    """Set all that differs."""
    flags, switches, configs = settings
    for name, value in flags.items():
        owner, _, attribute = name.rpartition(".")
        if _flag(name) != value:
            setattr(operator.attrgetter(owner)(torch), attribute, value)
    change: Any
    for (ask, change), value in zip(_SWITCHES, switches, strict=True):
        if ask() != value:
            change(value)
    for config, values in zip(_configs(), configs, strict=True):
        known = config.save_config_portable()
        config.load_config({name: value for name, value in values.items() if name in known and known[name] != value})


def _configs() -> tuple[Any, ...]:
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    return inductor_config, functorch_config


@contextlib.contextmanager
def tuned_in_turns(turn: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Within the block, Inductor measures in this thread which configuration of a kernel is the fastest within
    ``turn()``, one kernel after the other."""
    _have_tuning_take_turns()
    _turns.turn = turn
    try:
        yield
    finally:
        _turns.turn = None


_turns = threading.local()


@functools.cache
def _have_tuning_take_turns() -> None:
    try:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    except ImportError:
        return
    kind: Any = CachingAutotuner
    measure = kind.benchmark_all_configs

    @functools.wraps(measure)
    def in_turn(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        turn = getattr(_turns, "turn", None)
        with contextlib.nullcontext() if turn is None else turn():
            return measure(tuner, *args, **kwargs)

    kind.benchmark_all_configs = in_turn


def _kernels_in_batches() -> contextlib.AbstractContextManager[None]:
    try:
        from .cpp_batches import in_batches
    except ImportError:  # what it needs of torch has another name
        return contextlib.nullcontext()
    return in_batches()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def device_capability(device: torch.device) -> str:
    """What tells devices apart that may need other code: a GPU's compute capability, a CPU's 8-bit instructions."""
    if device.type == "cuda":
        return "{}.{}".format(*torch.cuda.get_device_capability(device))
    return str(int8_instructions()) if device.type == "cpu" else ""


def compile_fx(
    graph_module: torch.fx.GraphModule,
    inputs: list[Any],
    options: dict[str, Any],
    *,
    outside_dynamo: bool,
) -> Callable[..., Any]:
    """Compile with Inductor; ``outside_dynamo`` says that no Dynamo tracing context owns the graph any more."""
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    extra: dict[str, Any] = {"ignore_shape_env": True} if outside_dynamo else {}
    with _kernels_in_batches() if outside_dynamo else contextlib.nullcontext():
        compiled: Any = inductor_compile_fx(graph_module, inputs, config_patches=dict(options) or None, **extra)
    return compiled
