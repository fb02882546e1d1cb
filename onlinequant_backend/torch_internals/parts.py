"""Every private part of torch that this package reads or patches, and whether this torch has it.

The parts are looked up once, before anything else of this package needs them. Inductor is not imported for this: of a
module of its that is not loaded, the source is searched for the names.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

_log = logging.getLogger("onlinequant")


class Need(NamedTuple):
    """What a group of parts is needed for.

    Attributes:
        purpose: what needs them.
        names: of the parts, relative to ``torch``. ``f(x)`` is the parameter ``x`` of ``f``.
        otherwise: what happens without them; None: models stay in float.
        is_cuda: whether only CUDA builds of torch have them.
    """

    purpose: str
    names: str
    otherwise: str | None = None
    is_cuda: bool = False


KERNEL_BATCHES = "compiling CPU kernels in batches"
INSTRUCTION_CHECK = "remembering the CPU's instructions"
LAZY_GRAPHS = "generating a graph's code only when it is called"
TUNING = "measuring kernels one at a time and once"
COMPACT_MEMORY = "memory without gaps"
COMPILER_NAME = "naming the C++ compiler"

NEEDS = (
    Need(
        "following each compilation",
        """_dynamo.convert_frame._compile _dynamo.convert_frame._compile(code) _dynamo.convert_frame._compile(locals)
        _dynamo.convert_frame._compile(globals) _dynamo.convert_frame._compile(compiler_fn)
        _dynamo.convert_frame._compile(compile_id) _dynamo.convert_frame.compile_lock
        _dynamo.eval_frame.OptimizeContext _dynamo.eval_frame.OptimizedModule _dynamo.types.ConvertFrameReturn
        _dynamo.types.ConvertFrameReturn(apply_to_code) _C._dynamo.eval_frame._FrameAction
        _C._dynamo.eval_frame._FrameExecStrategy nn.Module._call_impl
        _dynamo.exc.BackendCompilerFailed _dynamo.exc.ShortenTraceback
        _dynamo.callback.CallbackArgs _dynamo.callback.CallbackTrigger.DYNAMO _dynamo.callback.callback_handler""",
    ),
    Need(
        "one graph for many sizes",
        """_dynamo.pgo.CodeState _dynamo.pgo._CODE_STATE _dynamo.pgo.auto_dynamic _dynamo.source.ConstantSource
        _dynamo.variables.builder.record_automatic_dynamic _dynamo.config.automatic_dynamic_shapes
        fx.experimental._config.use_duck_shape fx.experimental._config.backed_size_oblivious
        fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC
        fx.experimental.symbolic_shapes.ShapeEnv fx.experimental.symbolic_shapes.free_unbacked_symbols
        fx.experimental.symbolic_shapes.sym_or utils._sympy.interp.sympy_interp
        utils._sympy.reference.PythonReferenceAnalysis""",
    ),
    Need(
        "reading a graph",
        """_C._functorch.is_functorch_wrapped_tensor _C._functorch.peek_interpreter_stack
        _higher_order_ops.invoke_subgraph.invoke_subgraph _ops.HigherOrderOperator _ops.OpOverload
        _ops.OpOverloadPacket _refs.tensor utils._python_dispatch.TorchDispatchMode
        utils._python_dispatch.is_traceable_wrapper_subclass utils._python_dispatch.transform_subclass
        utils._pytree.tree_flatten utils._pytree.tree_leaves utils._pytree.tree_map_only
        utils._pytree.tree_unflatten""",
    ),
    Need(
        "the settings that a graph depends on",
        """_C._dynamo.guards.GlobalStateGuard _C._get_mkldnn_enabled
        _C._set_mkldnn_enabled _C._get_sdp_priority_order _C._set_sdp_priority_order _dynamo.config._config
        _dynamo.config.error_on_nested_fx_trace
        _dynamo.config.recompile_limit _functorch.config _guards.TracingContext.get _guards.Guard.inner_create_fn
        utils._config_module.ConfigModule.patch utils._config_module.ConfigModule.load_config
        utils._config_module.ConfigModule.save_config_portable""",
    ),
    Need("noticing changed weights", "Tensor._version _prims_common.clone_preserve_strides"),
    Need(
        "compiling with Inductor",
        """_guards.tracing _subclasses.FakeTensorMode _dynamo.utils.counters _inductor.compile_fx.compile_fx
        _inductor.compile_fx.compile_fx(config_patches) _inductor.compile_fx.compile_fx(ignore_shape_env)
        utils._config_module.ConfigModule.get_config_copy utils._config_module.ConfigModule.get_type
        _inductor.config.unsafe_marked_cacheable_functions _inductor.list_mode_options _inductor.utils.clear_caches
        _inductor.runtime.cache_dir_utils.default_cache_dir""",
    ),
    Need("8-bit kernels", "_scaled_mm cpu._is_amx_tile_supported cpu._is_avx2_supported cpu._is_vnni_supported"),
    Need("measuring kernels on a GPU", "cuda._sleep", is_cuda=True),
    Need(
        "CUDA graphs",
        """_C._cuda_clearCublasWorkspaces _C._cuda_endAllocateToPool _C._cuda_releasePool
        _inductor.runtime.static_triton_launcher.StaticallyLaunchedTritonKernel.run""",
        "steps run without a CUDA graph",
        is_cuda=True,
    ),
    Need(
        KERNEL_BATCHES,
        """_inductor.async_compile.AsyncCompile.cpp_pybinding _inductor.async_compile.AsyncCompile.wait
        _inductor.async_compile.get_compile_threads _inductor.codecache.LambdaFuture
        _inductor.codecache.CppPythonBindingsCodeCache.suffix_template
        _inductor.codecache.CppPythonBindingsCodeCache.load_async
        _inductor.codecache.CppPythonBindingsCodeCache._load_library_inner""",
        "they are compiled one by one",
    ),
    Need(
        INSTRUCTION_CHECK,
        "_inductor.cpu_vec_isa._get_isa_dry_compile_fingerprint _inductor.cpu_vec_isa.VecISA.check_build",
        "each process checks them again",
    ),
    Need("compiling in float without the other parts", "_dynamo.lookup_backend", "models run uncompiled there"),
    Need(LAZY_GRAPHS, "fx._lazy_graph_module._LazyGraphModule", "it is generated at once"),
    Need(
        TUNING,
        "_inductor.runtime.triton_heuristics.CachingAutotuner.benchmark_all_configs",
        "several are measured at once, and some in each process",
    ),
    Need(
        COMPACT_MEMORY,
        "_C._accelerator_setAllocatorSettings cuda.memory._snapshot",
        "steps take up to a third more memory",
    ),
    Need(
        COMPILER_NAME,
        "_inductor.cpp_builder.get_cpp_compiler _inductor.exc.InvalidCxxCompiler",
        "`onlinequant doctor` does not name it",
    ),
)


def names_of(need: Need) -> list[str]:
    """The full names of a group's parts."""
    return [f"torch.{name}" for name in need.names.split()]


@functools.cache
def _absent() -> dict[str, list[str]]:
    """The parts that this torch lacks, by purpose."""
    absent = {
        need.purpose: [name for name in names_of(need) if not _is_there(name)]
        for need in NEEDS
        if torch.version.cuda or not need.is_cuda
    }
    for need in NEEDS:
        if need.otherwise and absent.get(need.purpose):
            _log.info("%s: %s", _lack(absent[need.purpose], need.purpose), need.otherwise)
    return absent


def why_float() -> str | None:
    """Why every model stays in float with this torch; None if it does not."""
    for need in NEEDS:
        names = _absent().get(need.purpose)
        if names and need.otherwise is None:
            return _lack(names, need.purpose)
    return None


def lacks(purpose: str) -> bool:
    """Whether this torch lacks a part that is needed for ``purpose``."""
    return bool(_absent()[purpose])


def absences() -> list[str]:
    """A sentence for each group of parts that this torch lacks, with what happens without them."""
    return [
        f"{_lack(names, need.purpose)}: {need.otherwise or 'models stay in float'}"
        for need in NEEDS
        if (names := _absent().get(need.purpose))
    ]


def _lack(names: list[str], purpose: str) -> str:
    return f"torch {torch.__version__} has no {', '.join(names)}, which is needed for {purpose}"


def _is_there(name: str) -> bool:
    name, _, parameter = name.rstrip(")").partition("(")
    found: Any = torch
    path = "torch"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if path.startswith("torch._inductor") and _is_unloaded(found, part, path):
            return _is_in_source(name, parameter)
        found = _step(found, part, path)
        if found is _ABSENT:
            return False
    return not parameter or parameter in inspect.signature(found).parameters


def _is_unloaded(owner: Any, part: str, path: str) -> bool:
    """Whether ``path`` is a module that was not imported yet."""
    place = Path(torch.__file__).parent.joinpath(*path.split(".")[1:])
    is_module = place.is_dir() or place.with_suffix(".py").is_file()
    return isinstance(owner, ModuleType) and part not in vars(owner) and path not in sys.modules and is_module


def _step(owner: Any, part: str, path: str) -> Any:
    """``owner.part``, imported if it is a module; ``_ABSENT`` if there is none."""
    try:
        if isinstance(owner, ModuleType) and (path in sys.modules or not hasattr(owner, part)):
            return importlib.import_module(path)
        return getattr(owner, part)
    except (AttributeError, ImportError):
        return _ABSENT


_ABSENT = object()


def _is_in_source(name: str, parameter: str, folder: Path = Path(torch.__file__).parent) -> bool:
    """Whether the source of the module that ``name`` begins with has the rest of the names."""
    parts = name.split(".")[1:]
    place = folder
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if parts and (place / f"{parts[0]}.py").is_file():
        source = place / f"{parts.pop(0)}.py"
    else:
        source = place / "__init__.py"
    text = source.read_text(encoding="utf-8")
    return all(re.search(rf"\b{part}\b", text) for part in (*parts, *filter(None, [parameter])))
