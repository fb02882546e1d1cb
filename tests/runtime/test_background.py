"""Compiling in another thread: the model goes on in float, exactly, and nothing that happens meanwhile is lost."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import onlinequant_backend as oq
from onlinequant_backend.progress import told_to
from onlinequant_backend.quantization import weight_copy
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.quantization.weight_set import WeightSet
from onlinequant_backend.runtime import graph_compiler, sampling_run
from onlinequant_backend.runtime.background import Background
from onlinequant_backend.runtime.cache_entry import Entry
from onlinequant_backend.runtime.set_registry import known_sets
from onlinequant_backend.selection import layer_choice
from onlinequant_backend.torch_internals import dynamo_interface, inductor_interface
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.small import (
    CLOSE,
    WIDE,
    Small,
    X,
    cache_directory,
    compiled,
    entries,
    forget_everything,
    fused,
    small,
    texts_into,
)
from tests.helpers.threads import join_background
from tests.helpers.tiny import noise, relative_error

ASIDE = {"compile_in_background": True}
_compile_fx = inductor_interface.compile_fx


class SlowInductor(EagerInductor):
    """Compiles when it is allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        self.is_fx_tracing = False
        self.traces = False  # with FX meanwhile, as AOTAutograd does for most of the time
        self.phases = list[tuple[str, str]]()  # of the report when it was asked

    def __call__(self, *given: Any, **named: Any) -> Callable[..., Any]:
        self.thread = threading.current_thread()
        self.phases.append((report().phase, report().phase_reason))
        if self.traces:
            make_fx(lambda x: self._wait() or x + 1)(torch.ones(1))
        else:
            self._wait()
        return super().__call__(*given, **named)

    def _wait(self) -> None:
        self.is_fx_tracing = torch.fx._symbolic_trace.is_fx_tracing()  # in torch 2.15 of this thread only
        self.begun.set()
        assert self.may_end.wait(60)

    def finish(self) -> None:
        """Let it compile, and wait until all that follows is done, too."""
        assert self.begun.wait(60)
        self.may_end.set()
        join_background()


@pytest.fixture(autouse=True)
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowInductor]:
    stand_in = SlowInductor()
    monkeypatch.setattr(inductor_interface, "compile_fx", stand_in)
    yield stand_in
    stand_in.may_end.set()


def report() -> oq.Report:
    return oq.reports()[-1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_float_goes_on_until_the_compile_is_done(mode: Callable[[], Any], inductor: SlowInductor) -> None:
    told = list[str]()
    with mode(), told_to(texts_into(told)):
        model = small()
        step, expected = compiled(model, ASIDE), model(X)
        for _ in range(6):
            assert torch.equal(step(X), expected)
        assert inductor.begun.wait(60)
        assert inductor.thread is not threading.main_thread()
        assert torch.equal(step(X), expected)
        assert (report().phase, report().calls_observed) == ("compiling", 2)
        inductor.finish()
        for _ in range(3):
            assert 0 < relative_error(step(X), expected) < CLOSE
    assert len(inductor.graphs) == 1
    assert (report().phase, report().stats_path is not None) == ("quantized", True)
    assert told[-1] == report().summary()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """OpenMP's other threads are missing in a fork, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def forking(test: Callable[..., None]) -> Callable[..., None]:
    ignoring = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")(ignoring(test))


def in_fork(function: Callable[[], Any]) -> Any:
    """What ``function`` gives in a process that is forked now, and ends as such processes do."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        theirs.send(function())

    process = context.Process(target=child)
    process.start()
    assert ours.poll(60), "it hangs"
    process.join(60)
    assert process.exitcode == 0, "it hangs in the end"
    return ours.recv()


@forking
@torch.no_grad()
def test_a_fork_during_a_compile_goes_on_in_float(inductor: SlowInductor, one_thread: None) -> None:
    model, others = small(), (small(1), small(2))
    step, expected = compiled(model, ASIDE), model(X)
    for _ in range(3):
        step(X)
    assert inductor.begun.wait(60)

    def child() -> list[bool]:
        inductor.may_end.set()
        new = [(other, compiled(other, options), X) for other, options in zip(others, (ASIDE, {}), strict=True)]
        calls = [(model, step, X), (model, step, WIDE), *new]
        right = [torch.equal(call(x), one(x)) for one, call, x in calls for _ in range(4)]
        return [*right, *("forked" in one.phase_reason and one.phase == "float" for one in oq.reports())]

    assert all(in_fork(child))
    inductor.finish()
    assert 0 < relative_error(step(X), expected) < CLOSE


@forking
@torch.no_grad()
def test_a_fork_after_a_compile_runs_in_8_bit(inductor: SlowInductor, one_thread: None) -> None:
    model = small()
    step, expected = compiled(model, ASIDE), model(X)
    for _ in range(3):
        step(X)
    inductor.finish()
    assert 0 < in_fork(lambda: relative_error(step(X), expected)) < CLOSE


@torch.no_grad()
def test_it_says_8_bit_only_when_calls_are(
    inductor: SlowInductor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What follows a compile takes a second for SDXL: what was observed is saved."""
    caplog.set_level("INFO", "onlinequant")
    publish, told = Entry.publish, list[str]()
    saving, may_save = threading.Event(), threading.Event()

    def slowly(*given: Any) -> None:
        saving.set()
        assert may_save.wait(60)
        publish(*given)

    monkeypatch.setattr(Entry, "publish", slowly)
    model = small()
    step, expected = compiled(model, ASIDE), model(X)
    inductor.may_end.set()
    with told_to(texts_into(told)):
        for _ in range(3):
            step(X)
        assert saving.wait(60)
        assert torch.equal(step(X), expected)
        assert (report().phase, report().phase_reason) == ("compiling", "in the background, calls run in float")
        assert not any("quantized" in text for text in told)
        may_save.set()
        join_background()
    assert (report().phase, told[-1]) == ("quantized", report().summary())
    assert caplog.messages.count(report().summary()) == 1
    assert oq.Report.load(report().stats_path or "").phase == "quantized"
    assert 0 < relative_error(step(X), expected) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("replace", [False, True], ids=["in place", "new parameters"])
def test_weights_that_change_while_compiling(replace: bool, inductor: SlowInductor) -> None:
    model = small()
    step = compiled(model, ASIDE)
    for _ in range(3):
        step(X)
    assert inductor.begun.wait(60)
    before = model(X)
    for name, weight in fused(model).items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        if replace:
            layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        else:
            layer.weight.copy_(weight.clone())
    assert relative_error(before, model(X)) > 3 * CLOSE
    assert torch.equal(step(X), model(X))
    inductor.finish()
    errors = [relative_error(step(X), model(X)) for _ in range(3)]  # the first call may have been done again in float
    assert max(errors) < CLOSE
    assert min(errors[1:]) > 0


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_weights_of_larger_activations_that_come_beside_a_compile(when: str, inductor: SlowInductor) -> None:
    """They were not observed, so the first call in 8 bit looks at the ranges."""
    model = small()
    step = compiled(model, ASIDE)
    for _ in range(2):
        step(X)
    if when == "before":
        model.conv_in.weight.mul_(8)
    step(X)
    assert inductor.begun.wait(60)
    if when == "meanwhile":
        model.conv_in.weight.mul_(8)
    inductor.finish()
    for _ in range(2):
        picture = step(X)
        assert relative_error(picture, model(X)) < CLOSE
    assert not torch.equal(picture, model(X))


@torch.no_grad()
def test_weights_that_change_while_they_are_quantized(inductor: SlowInductor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    step = compiled(model, ASIDE)
    requantize, weight = Layer.requantize, model.linear.weight
    changed = threading.Event()

    def change_afterwards(layer: Layer, given: torch.Tensor, *more: Any) -> None:
        quantize = weight_copy.quantize_weight

        def change(*args: Any) -> Any:
            result = quantize(*args)
            if threading.current_thread() is not threading.main_thread() and given is weight and not changed.is_set():
                weight.copy_(-weight)  # after it was read, before anybody could take note of it
                changed.set()
            return result

        with monkeypatch.context() as patch:
            patch.setattr(weight_copy, "quantize_weight", change)
            requantize(layer, given, *more)

    for _ in range(2):
        step(X)
    for weights in known_sets:
        weights.layers[1].copy.drop()
    monkeypatch.setattr(Layer, "requantize", change_afterwards)
    step(X)
    inductor.finish()
    assert changed.is_set()
    errors = [relative_error(step(X), model(X)) for _ in range(2)]
    assert max(errors) < CLOSE
    assert errors[1] > 0


@torch.no_grad()
def test_the_caller_may_write_into_what_it_has_passed(inductor: SlowInductor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), X.clone()
    step = compiled(model, {**ASIDE, "max_error": 1e-9})
    seen = list[torch.Tensor]()
    over_budget = layer_choice.over_budget

    def looking(observed: Any, args: Any, *rest: Any) -> Any:
        seen.extend(value for value in args if isinstance(value, torch.Tensor) and value.shape == X.shape)
        assert written.wait(60)
        return over_budget(observed, args, *rest)

    monkeypatch.setattr("onlinequant_backend.selection.layer_choice.over_budget", looking)
    written = threading.Event()
    for _ in range(3):
        step(x)
    x.zero_()
    written.set()
    join_background()
    assert torch.equal(seen[0], X)


@torch.no_grad()
def test_another_size_is_compiled_aside_as_well(inductor: SlowInductor) -> None:
    model = small()
    step = compiled(model, ASIDE)
    for _ in range(3):
        step(X)
    inductor.finish()
    assert not torch.equal(step(X), model(X))
    inductor.begun.clear()
    inductor.may_end.clear()
    assert torch.equal(step(WIDE), model(WIDE))
    assert inductor.begun.wait(60)
    assert torch.equal(step(WIDE), model(WIDE))
    inductor.finish()
    step(WIDE)  # the first of a size looks for drift, and may be in float
    for x in (WIDE, X, WIDE):
        assert 0 < relative_error(step(x), model(x)) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("place", ["quantizing", "compiling"])
def test_no_size_waits_for_what_is_done_for_another(
    place: str, inductor: SlowInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "quantizing":
        quantize = WeightSet.quantize
        monkeypatch.setattr(WeightSet, "quantize", lambda *given: inductor._wait() or quantize(*given))
    model = small()
    step = compiled(model, ASIDE)
    for x in (X, WIDE, X):  # Dynamo traces them both, and the third call starts the work
        step(x)
    assert inductor.begun.wait(60)
    for x in (WIDE, X, WIDE):
        assert torch.equal(step(x), model(x))
    assert not inductor.may_end.is_set()
    inductor.finish()
    for x in (WIDE, X):
        for _ in range(3):
            step(x)
            join_background()
        assert 0 < relative_error(step(x), model(x)) < CLOSE


@torch.no_grad()
def test_every_model_goes_on_while_one_is_traced(inductor: SlowInductor) -> None:
    """Whoever traces with FX tells so to all of the process, where Dynamo then refuses to work."""
    inductor.traces = True
    with dynamo_interface.others_call_uncompiled():  # this thread has compiled before
        pass
    model, other, new = small(0), small(1), small(2)
    torch._dynamo.utils.counters.clear()
    step, plain = compiled(model, ASIDE), torch.compile(other, backend="eager")
    for _ in range(3):
        assert torch.equal(step(X), model(X)) and torch.equal(plain(X), other(X))
    assert inductor.begun.wait(60)
    assert inductor.is_fx_tracing
    for _ in range(3):
        assert torch.equal(step(X), model(X)) and torch.equal(plain(X), other(X))
    assert torch.equal(torch.compile(new, backend="eager")(X), new(X))
    inductor.finish()
    assert 0 < relative_error(step(X), model(X)) < CLOSE and torch.equal(plain(X), other(X))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert torch._dynamo.config.error_on_nested_fx_trace


def test_a_trace_has_nothing_to_do_with_modules_of_other_threads() -> None:
    """FX replaces ``Module.__call__`` for all threads, and refuses modules that are none of what it traces."""
    other, results, now = small(1), list[torch.Tensor](), threading.Event()

    class Slow(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            now.set()
            thread.join(60)
            return x + 1

    thread = threading.Thread(target=lambda: now.wait(60) and results.append(other(X)))
    thread.start()
    with dynamo_interface.others_call_uncompiled():
        torch.fx.symbolic_trace(Slow())
    assert torch.equal(results[0], other(X))


def test_the_setting_that_is_for_a_trace_is_set_back() -> None:
    seen = list[bool]()
    other = threading.Thread(target=lambda: seen.append(torch._dynamo.config.error_on_nested_fx_trace))
    with dynamo_interface.others_call_uncompiled():
        other.start()
        other.join()
        assert not torch._dynamo.config.error_on_nested_fx_trace
    assert seen == [False] and torch._dynamo.config.error_on_nested_fx_trace


@torch.no_grad()
def test_a_size_that_a_graph_serves_already_needs_no_other_thread(
    inductor: SlowInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    inductor.may_end.set()
    model = small()
    step = compiled(model, ASIDE)
    for x in (X, X, X, X, WIDE, WIDE, WIDE):
        step(x)
        join_background()
    built = len(inductor.graphs)
    monkeypatch.setattr(Background, "start", lambda *_: pytest.fail("another thread was asked for"))
    third = noise(3, 4, 8, 12)
    step(third)  # may look for drift, and be in float
    assert 0 < relative_error(step(third), model(third)) < CLOSE
    assert (len(inductor.graphs), report().phase) == (built, "quantized")


@torch.no_grad()
def test_inputs_with_gaps_and_expanded_ones(inductor: SlowInductor) -> None:
    class Scaled(Small):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * scale.view(-1, 1, 1, 1)

    torch.manual_seed(0)
    model = Scaled().requires_grad_(False)
    x, scale = noise(2, 6, 8, 8)[:, 1:5], torch.tensor(2.0).expand(2)
    step = compiled(model, ASIDE)
    for _ in range(3):
        step(x, scale)
    inductor.finish()
    assert 0 < relative_error(step(x, scale), model(x, scale)) < CLOSE


@torch.no_grad()
def test_an_observed_run_ends_at_once(inductor: SlowInductor) -> None:
    model = small()
    step, expected = compiled(model, ASIDE), model(X)
    with sampling_run(4):
        for _ in range(4):
            assert torch.equal(step(X), expected)
    with sampling_run(4):
        assert torch.equal(step(X), expected)
        inductor.finish()
        assert 0 < relative_error(step(X), expected) < CLOSE  # in the middle of a run
    assert report().calls_observed == 4


@torch.no_grad()
def test_what_fails_whenever_it_is_moved_is_given_up(inductor: SlowInductor) -> None:
    model = small()
    step = compiled(model, ASIDE)
    inductor.error = RuntimeError("no compiler")
    for _ in range(2):
        step(X)
    for phase in ("compiling", "compiling", "float"):
        inductor.begun.clear()
        inductor.may_end.clear()
        step(X)
        assert inductor.begun.wait(60) and report().phase == "compiling"
        model.linear.weight.data = model.linear.weight.data.clone()
        inductor.finish()
        assert (report().phase == "float") == (phase == "float")
    assert torch.equal(step(X), model(X))


@torch.no_grad()
def test_a_compile_that_fails_is_told_and_float_goes_on(
    inductor: SlowInductor, caplog: pytest.LogCaptureFixture
) -> None:
    inductor.error = RuntimeError("no compiler")
    model = small()
    step = compiled(model, ASIDE)
    for _ in range(3):
        step(X)
    inductor.finish()
    for _ in range(3):
        assert torch.equal(step(X), model(X))
    assert (report().phase, report().phase_reason) == ("float", "it failed: RuntimeError: no compiler")
    assert sum("continues in float" in message for message in caplog.messages) == 1


@torch.no_grad()
@pytest.mark.parametrize("aside", [True, False])
@pytest.mark.parametrize("place", [(WeightSet, "quantize"), (graph_compiler, "build")], ids=["quantizing", "compiling"])
def test_what_fails_is_tried_again_in_the_next_run(
    place: tuple[Any, str], aside: bool, inductor: SlowInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lacked, such as memory, may be there then; within a run each try would cost as much as the first."""
    inductor.may_end.set()
    original, failures = getattr(*place), list[int]()

    def failing(*given: Any, **named: Any) -> Any:
        if len(failures) < fails:
            failures.append(len(failures))
            raise MemoryError("no memory left")
        return original(*given, **named)

    monkeypatch.setattr(*place, failing)
    model = small()
    step = compiled(model, {"compile_in_background": aside})

    def draw() -> list[bool]:
        in_float = []
        with sampling_run(4):
            for _ in range(4):
                in_float.append(torch.equal(step(X), model(X)))
                join_background()
        join_background()
        return in_float

    fails = 2
    assert all(draw()) and report().phase == "float" and len(failures) == 1  # after the run, which was observed
    assert report().phase_reason == "it failed: MemoryError: no memory left"
    assert all(draw()) and report().phase == "float" and len(failures) == 2
    assert draw() == [aside, False, False, False] and report().phase == "quantized"


@torch.no_grad()
def test_what_fails_in_three_runs_is_given_up(inductor: SlowInductor) -> None:
    inductor.may_end.set()
    inductor.error = RuntimeError("no compiler")
    model = small()
    step = compiled(model, ASIDE)
    for _ in range(3):
        with sampling_run(2):
            for _ in range(2):
                step(X)
                join_background()
        join_background()
    assert len(inductor.phases) == 3
    inductor.error = None
    with sampling_run(2):
        for _ in range(2):
            assert torch.equal(step(X), model(X))
    join_background()
    assert (len(inductor.phases), report().phase) == (3, "float")


@torch.no_grad()
def test_after_a_restart_the_first_call_is_in_8_bit(inductor: SlowInductor) -> None:
    """What is compiled already is loaded while the caller waits, since that takes seconds."""
    left_by_another_process(inductor, X)
    model, told = small(), list[str]()
    with told_to(texts_into(told)):
        assert 0 < relative_error(compiled(model, ASIDE)(X), model(X)) < CLOSE
    assert (report().phase, report().cache_hit, report().calls_observed) == ("quantized", True, 0)
    assert inductor.thread is threading.main_thread()
    assert inductor.phases == [("compiling", "loading from the cache")]
    assert [text for text in told if text.startswith("loading from the cache")]
    assert not [text for text in told if text.startswith("compiling")]


@torch.no_grad()
@pytest.mark.parametrize("how", ["deleted", "other options", "another size", "other settings"])
def test_what_was_not_compiled_before_the_restart_is_aside(how: str, inductor: SlowInductor) -> None:
    with torch._inductor.config.patch(max_fusion_size=7 if how == "other settings" else 64):
        left_by_another_process(inductor, X)
    inductor.may_end.clear()
    if how == "deleted":
        shutil.rmtree(cache_directory() / "inductor")
    options = {**ASIDE, "exclude": ("linear",)} if how == "other options" else ASIDE
    x = noise(1, 4, 12, 12) if how == "another size" else X
    model = small()
    step = compiled(model, options)
    for _ in range(3):
        assert torch.equal(step(x), model(x))
    assert report().phase == "compiling" and inductor.begun.wait(60)
    inductor.finish()
    assert inductor.thread is not threading.main_thread()
    assert inductor.phases == [("compiling", "in the background, calls run in float")]
    step(x)  # of another size: may be done again in float
    assert 0 < relative_error(step(x), model(x)) < CLOSE
    assert (report().phase, report().calls_observed) == ("quantized", 0)


def left_by_another_process(inductor: SlowInductor, x: torch.Tensor) -> None:
    """A cache with all that it takes for calls like this one."""
    inductor.may_end.set()
    step = compiled(small(), ASIDE)
    for _ in range(3):
        step(x)
        join_background()
    assert report().phase == "quantized"
    forget_everything()
    inductor.phases.clear()
    inductor.begun.clear()
    inductor.thread = None


@torch.no_grad()
@pytest.mark.parametrize("x", [X, WIDE], ids=["first size", "second size"])
@pytest.mark.parametrize("back", [False, True], ids=["away", "away and back"])
def test_a_model_that_was_moved_while_it_was_compiled_is_compiled_again(
    x: torch.Tensor, back: bool, inductor: SlowInductor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "onlinequant")
    model = small().half().float()  # so that moving it to float16 and back changes nothing
    step = compiled(model, ASIDE)
    for _ in range(3):
        step(X)
    if x is not X:
        inductor.finish()
        inductor.begun.clear()
        inductor.may_end.clear()
        step(x)
    assert inductor.begun.wait(60)
    inductor.error = RuntimeError("these are on two devices")
    model.half()
    if back:
        model.float()
    inductor.finish()
    model.float()
    assert report().phase != "float" and "moved while it was compiled" in caplog.text
    inductor.error = None
    step(x)
    inductor.finish()
    step(x)  # the first of a size looks for drift, and may be in float
    assert 0 < relative_error(step(x), model(x)) < CLOSE
    assert report().phase == "quantized"


@torch.no_grad()
def test_what_belongs_to_the_callers_thread_is_compiled_there(inductor: SlowInductor) -> None:
    inductor.may_end.set()
    model = small()
    step = compiled(model, ASIDE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            picture = step(X)
        assert relative_error(picture.float(), model(X).float()) < CLOSE
    assert inductor.thread is threading.main_thread()


@torch.no_grad()
def test_float_weights_are_not_given_up_behind_a_running_call(inductor: SlowInductor) -> None:
    inductor.may_end.set()
    step = compiled(small(), {**ASIDE, "free_float_weights": True})
    for _ in range(3):
        step(X)
    assert inductor.thread is threading.main_thread()
    assert report().phase == "quantized"


@torch.no_grad()
def test_two_graphs_of_one_model_at_once(inductor: SlowInductor) -> None:
    model = small()
    options = {**ASIDE, "shapes": "static"}
    steps = [compiled(model, options), compiled(model, {**options, "exclude": ("linear",)})]
    for _ in range(3):
        for step in steps:
            assert torch.equal(step(X), model(X))
    inductor.finish()
    for step in steps:
        step(X)
    inductor.finish()
    for step in steps:
        assert 0 < relative_error(step(X), model(X)) < CLOSE


_LEAVING = """
import threading
import time
from concurrent.futures import ThreadPoolExecutor
import torch
from onlinequant_backend.compilation import compile_process
from onlinequant_backend.torch_internals import inductor_interface
import onlinequant_backend as oq
from tests.helpers.small import X, compiled, small

compile_process.is_possible = lambda: False
begun = threading.Event()

def slow(graph, *_given, **_named):
    begun.set()
    with ThreadPoolExecutor(1) as pool:  # as Inductor does
        for _ in range(200):
            pool.submit(torch.mm, torch.ones(300, 300), torch.ones(300, 300)).result()
            time.sleep(0.005)
    return graph

inductor_interface.compile_fx = slow
with torch.no_grad():
    step = compiled(small(), {"compile_in_background": True})
    for _ in range(3):
        step(X)
assert begun.wait(60)
print("leaving")
"""


def test_a_process_that_ends_finishes_it() -> None:
    # Torch warns of Python 3.13.0, and of no other.
    command = [sys.executable, "-W", "ignore:Guards may run slower:RuntimeWarning", "-c", _LEAVING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
    assert len(entries()) == 1


@torch.no_grad()
def test_with_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_interface, "compile_fx", _compile_fx)
    model: Small = small()
    x = noise(1, 4, 8, 8, seed=5)
    step = compiled(model, ASIDE)
    pictures = [step(x) for _ in range(3)]
    join_background()
    assert all(torch.equal(picture, model(x)) for picture in pictures)
    assert 0 < relative_error(step(x), model(x)) < CLOSE
    assert report().phase == "quantized"
