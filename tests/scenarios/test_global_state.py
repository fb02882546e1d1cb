"""What holds for the whole process or thread: autocast, default dtype and device, precision of products."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import onlinequant_backend as oq
from onlinequant_backend.torch_internals import inductor_interface, torch_settings
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.small import CLOSE, WIDE, X, compiled, forget_everything, small
from tests.helpers.tiny import relative_error

ROOT = Path(oq.__file__).parent.parent
# Functions that take the default dtype or device where none is given.
FACTORIES = re.compile(
    r"torch\.(arange|as_tensor|asarray|empty|empty_strided|eye|full|linspace|logspace|normal|ones|rand|randint|randn|"
    r"randperm|scalar_tensor|tensor|zeros)"
)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def fp32_precision() -> Iterator[None]:
    """Set by the newer name, after which torch refuses to tell the older flag."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            _ = torch.backends.cuda.matmul.allow_tf32
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def autocast(dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autocast and the default dtype do when a graph is compiled is for good, as with Inductor itself."""

    def compile_fx(graph_module: torch.fx.GraphModule, inputs: list[Any], *_: Any, **__: Any) -> Callable[..., Any]:
        traced: Callable[..., Any] = aot_eager(graph_module, inputs)
        return traced

    monkeypatch.setattr(inductor_interface, "compile_fx", compile_fx)


def pictures(model: nn.Module, **options: Any) -> list[torch.Tensor]:
    """Of an observed call, of one in 8 bit, and of one that finds the calibration in the cache."""
    found = []
    for calls in (3, 1):
        forget_everything()
        step = compiled(model, {"max_error": 0.5, "drift_check_every": 1, **options})
        found += [step(X) for _ in range(calls)]
        assert oq.reports()[-1].phase == "quantized", oq.reports()[-1].phase_reason
    assert oq.reports()[-1].cache_hit
    return [found[0], found[2], found[3]]


@torch.no_grad()
@pytest.mark.parametrize(
    ("state", "precision", "method"),
    [
        pytest.param(lambda: default_dtype(torch.bfloat16), "int8", "mse", id="bfloat16"),
        pytest.param(lambda: default_dtype(torch.bfloat16), "fp8", "percentile", id="bfloat16 fp8"),
        pytest.param(lambda: default_dtype(torch.float64), "int8", "percentile", id="float64"),
        pytest.param(lambda: default_device("meta"), "int8", "mse", id="meta"),
        pytest.param(deterministic, "int8", "mse", id="deterministic"),
        pytest.param(fp32_precision, "int8", "mse", id="fp32_precision"),
    ],
)
def test_a_state_that_the_model_does_not_depend_on_changes_no_bit(
    state: Callable[[], contextlib.AbstractContextManager[None]],
    precision: str,
    method: str,
    inductor: EagerInductor,
    tmp_path: Path,
) -> None:
    model = small()
    model.conv_in.weight[3] *= 300  # a channel that is smoothed
    options = {"precision": precision, "calibration_method": method}
    expected = pictures(model, **options, cache_dir=str(tmp_path / "plain"))
    assert 0 < relative_error(expected[1], expected[0]) < CLOSE
    with state():
        actual = pictures(model, **options, cache_dir=str(tmp_path / "other"))
    assert all(map(torch.equal, actual, expected))


class WithTable(nn.Module):
    """Makes a tensor of the default dtype beside its result."""

    def __init__(self) -> None:
        super().__init__()
        self.small = small()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.small(x), torch.linspace(0.5, 1, x.shape[-1]).sin()


@torch.no_grad()
@pytest.mark.parametrize(
    ("first", "second", "shapes"),
    [
        pytest.param(autocast, contextlib.nullcontext, "static", id="autocast off"),
        pytest.param(autocast, lambda: autocast(torch.float16), "auto", id="another autocast"),
        pytest.param(contextlib.nullcontext, lambda: default_dtype(torch.float64), "auto", id="another default dtype"),
    ],
)
def test_another_state_is_another_graph(
    first: Callable[[], contextlib.AbstractContextManager[Any]],
    second: Callable[[], contextlib.AbstractContextManager[Any]],
    shapes: str,
    tracing: None,
) -> None:
    """Also where Dynamo has seen that the sizes change, and where they may not."""
    model = WithTable()
    step = compiled(model, {"shapes": shapes, "calibration_steps": 1})
    graphs = []
    for state in (first, second, first):
        for x in (X, WIDE, X, WIDE):
            with state():
                pairs = zip(step(x), model(x), strict=True)
            for actual, expected in pairs:
                assert actual.dtype is expected.dtype
                assert relative_error(actual, expected) < CLOSE
        graphs.append(len(oq.reports()))
    assert 0 < graphs[0] < graphs[1] == graphs[2]
    assert {report.phase for report in oq.reports()} == {"quantized"}


@torch.no_grad()
@pytest.mark.parametrize("inside", [True, False])
def test_a_run_that_ends_outside_of_autocast_is_compiled_as_it_was_called(inside: bool, tracing: None) -> None:
    model, there, elsewhere = small(), autocast(enabled=inside), autocast(enabled=not inside)
    step = compiled(model, {"exclude": ("conv_out",)})
    with there:
        expected = model(X)
    with elsewhere, oq.sampling_run(2):
        for _ in range(2):
            with there:
                assert torch.equal(step(X), expected)
    with there:
        actual = step(X)
    assert oq.reports()[-1].phase == "quantized", oq.reports()[-1].phase_reason
    assert actual.dtype is expected.dtype
    assert 0 < relative_error(actual, expected) < CLOSE
    assert not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def test_autocast_has_a_place_of_its_own_in_the_cache(inductor: EagerInductor) -> None:
    keys = []
    for state in (autocast(), autocast(torch.float16), autocast(enabled=False), default_dtype(torch.float64)):
        forget_everything()
        step = compiled(small())
        with state:
            for _ in range(3):
                step(X)
        keys.append(oq.reports()[-1].key)
    assert len(set(keys)) == 4
    assert len({key[:48] for key in keys}) == 1  # and share their calibration


@pytest.mark.parametrize(
    "change",
    [
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda: torch.set_float32_matmul_precision("medium"),
    ],
)
def test_settings_are_told_and_set_by_whichever_name_they_were_set(change: Callable[[], None]) -> None:
    """As the process that compiles for this one does it."""
    before = torch_settings.settings()
    try:
        change()
        told = torch_settings.settings()
        assert told != before
        for one in (before, told):
            torch_settings.apply_settings(one)
            assert torch_settings.settings() == one
    finally:
        torch_settings.apply_settings(before)


def test_every_tensor_of_ours_names_its_dtype_and_its_device() -> None:
    """Else they are what the user's program has set for its own."""
    folders = [ROOT / name for name in ("onlinequant_backend", "passes", "comfy_integration")]
    calls = [
        (path, node)
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and FACTORIES.fullmatch(ast.unparse(node.func))
    ]
    assert len(calls) > 50
    vague = [
        f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        for path, node in calls
        if not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}
    ]
    assert not vague
