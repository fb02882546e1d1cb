"""Runs a model with a torch that lacks a private part: ``python -m tests.helpers.torch_without NAME...``.

Each name is handled in a fork of its own and gives a line of JSON. The part is hidden while this package is imported;
torch's own code keeps it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import traceback
import types
from typing import Any

import torch
import torch._inductor.async_compile
import torch._inductor.compile_fx
import torch._inductor.runtime.triton_heuristics  # with all other modules that have parts
import torch._inductor.select_algorithm
from torch import nn


def hide(name: str) -> None:
    """Put copies of torch's modules in their places that lack ``name``."""
    path, _, parameter = name.rstrip(")").partition("(")
    owner, _, last = path.rpartition(".")
    if parameter:
        changed = _without_member(_found(owner), last) | {last: _with_fewer(getattr(_found(owner), last), parameter)}
    else:
        if path in sys.modules:
            sys.modules[path] = None  # type: ignore[assignment]
        changed = _without_member(_found(owner), last)
    while True:
        copy = _copy(_found(owner), changed)
        above, _, name = owner.rpartition(".")
        if above:
            changed = {**vars(_found(above)), name: copy}
        if isinstance(copy, types.ModuleType):
            sys.modules[owner] = copy
        if not above:
            return
        owner = above


def _without_member(owner: Any, name: str) -> dict[str, Any]:
    members = (
        vars(owner) if isinstance(owner, types.ModuleType) else {each: getattr(owner, each) for each in dir(owner)}
    )
    if name in members.get("_config", ()):  # an option
        members = {**members, "_config": {each: value for each, value in members["_config"].items() if each != name}}
    return {each: value for each, value in members.items() if each != name}


def _copy(original: Any, members: dict[str, Any]) -> Any:
    if not isinstance(original, types.ModuleType):
        return types.SimpleNamespace(**members)
    copy = type(original).__new__(type(original))
    types.ModuleType.__init__(copy, original.__name__)  # those of configs take no name
    vars(copy).update(members)
    return copy


def _with_fewer(function: Any, parameter: str) -> Any:
    def other(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a function with other parameters was called")

    signature = inspect.signature(function)
    kept = [each for name, each in signature.parameters.items() if name != parameter]
    other.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return other


def _found(path: str) -> Any:
    if path in sys.modules:
        return sys.modules[path]
    owner, _, name = path.rpartition(".")
    return getattr(_found(owner), name) if hasattr(_found(owner), name) else importlib.import_module(path)


def run_without(name: str) -> dict[str, Any]:
    """What a model's report says, and whether its result is that of eager mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16)).requires_grad_(False)
    x = torch.randn(4, 16)
    expected = model(x)
    modules = dict(sys.modules)
    hide(name)
    import onlinequant_backend
    from onlinequant_backend.comfy_integration.compiled_method import CompiledMethod

    # Torch imports much only when it needs it, and it has all its parts.
    sys.modules.update(modules)

    options = {"precision": "int8", "calibration_steps": 1, "compile_in_background": True}
    with torch.no_grad():
        result = torch.compile(model, backend=onlinequant_backend.onlinequant, options=options)(x)
    (report,) = onlinequant_backend.reports()
    return {
        "phase": report.phase,
        "reason": report.phase_reason,
        "is_equal": torch.allclose(result, expected, atol=1e-5),
        "node": CompiledMethod({}, lambda update: None).trouble,
    }


def main() -> None:
    for name in sys.argv[1:]:
        if os.fork():
            os.wait()
            continue
        try:
            found = run_without(name)
        except BaseException:
            found = {"error": traceback.format_exc()}
        print(json.dumps({"name": name, **found}), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
