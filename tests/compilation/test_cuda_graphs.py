"""CUDA graphs: the same pictures as without, whatever changes between calls, and a reason where there is none.

Most tests run twice: on a GPU, and on the CPU with a stand-in for what CUDA does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from onlinequant_backend.compilation import counting_call, cuda_graphs, graph_memory
from onlinequant_backend.compilation.cuda_graphs import GraphedCall, _Lane
from onlinequant_backend.compilation.graph_memory import allocates_in_graph
from onlinequant_backend.kernels import clip_counting

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class FakeLane:
    """Behaves like a CUDA graph: a replay computes from the same memory, into the same memory."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.fails = False
        self.capturing = False
        self.alive = 0
        self.waits = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with self.lock:
            yield

    def wait(self) -> None:
        assert self.lock.locked()
        self.waits += 1

    def is_capturing(self) -> bool:
        return self.capturing

    def side_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def trim(self) -> None:
        pass

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
        outputs = run()

        def replay() -> None:
            for old, new in zip(tree_leaves(outputs), tree_leaves(run()), strict=True):
                if isinstance(old, torch.Tensor):
                    old.untyped_storage().copy_(new.untyped_storage())

        return replay, outputs


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test runs. Without gradients, as a denoiser does."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if request.param == "cpu":
            lane = FakeLane()
            patch.setattr(cuda_graphs, "lane_of", lambda device: lane)
        yield torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def fake(device: torch.device) -> FakeLane:
    if device.type != "cpu":
        pytest.skip("tests the decision alone")
    return cuda_graphs.lane_of(device)  # type: ignore[return-value]


class Function:
    """``x * weight + shift`` as a compiled function returns it, counting how often Python runs it."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, shift: Any = 1) -> list[torch.Tensor]:
        self.runs += 1
        return [x * weight + shift]


class Case:
    """A graphed ``Function`` with a weight and inputs; ``check`` compares a call with the plain function."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.function = Function()
        self.graphed = GraphedCall(self.function, device, (False, True, False))
        self.weight = torch.randn(4, device=device)

    def x(self, *shape: int) -> torch.Tensor:
        return torch.randn(*(shape or (2, 4)), device=self.device)

    def check(self, x: torch.Tensor | None = None, shift: Any = 1) -> torch.Tensor:
        x = self.x() if x is None else x
        (result,) = self.graphed(x, self.weight, shift)
        (expected,) = Function()(x, self.weight, shift)
        assert torch.equal(result, expected) and result.stride() == expected.stride()
        return result


@pytest.fixture
def case(device: torch.device) -> Case:
    return Case(device)


def test_captures_once_and_replays(case: Case) -> None:
    captures = []
    for _ in range(4):
        case.check()
        captures.append(case.graphed.captures)
    assert captures == [0, 1, 1, 1]
    assert case.graphed.reason is None


def test_python_does_not_run_again_on_a_gpu(case: Case) -> None:
    if case.device.type == "cpu":
        pytest.skip("the stand-in runs the function at each replay")
    for _ in range(5):
        case.check()
    # Plainly, and for the capture; some captures are tried first.
    assert case.function.runs == 2 + allocates_in_graph()


def test_a_caller_keeps_its_outputs(case: Case) -> None:
    kept = [case.check() for _ in range(5)]
    values = [result.clone() for result in kept]
    kept[2].zero_()  # a caller may write into what it got
    case.check()
    for i in (0, 1, 3, 4):
        assert torch.equal(kept[i], values[i])


def test_weights_changed_in_place(case: Case) -> None:
    for _ in range(4):
        case.check()
        case.weight.add_(1)
    case.check()
    assert case.graphed.captures == 1


def test_replaced_weights_are_captured_anew(case: Case) -> None:
    case.weight = torch.nn.Parameter(case.weight, requires_grad=False)
    old = []
    for expected in (1, 2):
        for _ in range(3):
            case.check()
        assert case.graphed.captures == expected
        old.append(case.weight.data)  # keeps its memory, so that the new one lies elsewhere
        case.weight.data = torch.randn_like(case.weight)


def test_weights_that_move_at_every_call(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "onlinequant")
    old = []
    for _ in range(20):
        case.check()
        old.append(case.weight)
        case.weight = case.weight.clone()
    assert case.graphed.captures == 0
    assert case.graphed.reason is not None and "moved" in case.graphed.reason
    assert len(caplog.records) == 1


def test_several_sizes(case: Case) -> None:
    for _ in range(3):
        for size in (1, 2, 3):
            case.check(case.x(size, 4))
    assert case.graphed.captures == 3


def test_the_least_recently_used_size_is_dropped(case: Case) -> None:
    for size in range(1, 9):  # as many as are kept
        case.check(case.x(size, 4))
        case.check(case.x(size, 4))
    assert case.graphed.captures == 8
    case.check(case.x(1, 4))
    case.check(case.x(9, 4))  # size 2 goes
    case.check(case.x(1, 4))
    case.check(case.x(1, 4))
    assert case.graphed.captures == 8
    case.check(case.x(2, 4))
    case.check(case.x(2, 4))
    assert case.graphed.captures == 9


@pytest.mark.parametrize("values", [(1, 2, 3), (1, 1.0, True), (0.0, -0.0), (0.5, 0.25)])
def test_numbers_are_part_of_the_signature(case: Case, values: tuple[Any, ...]) -> None:
    for _ in range(3):
        for value in values:
            case.check(shift=value)
    assert case.graphed.captures == len(values)


def test_strides_and_dtypes_are_part_of_the_signature(case: Case) -> None:
    for _ in range(3):
        case.check(case.x(4, 4).t())
        case.check(case.x(4, 4))
        case.check(case.x(4, 4).to(torch.float64))
    assert case.graphed.captures == 3


def test_inputs_of_odd_strides(case: Case) -> None:
    for _ in range(4):
        case.check(case.x(1, 4).expand(3, 4))
        case.check(case.x(6, 8)[::2, ::2])
        case.check(case.x(1).expand(4))
        case.check(case.x(0, 4))
    assert case.graphed.reason is None


def test_a_nan_is_not_taken_for_a_change(case: Case) -> None:
    for _ in range(3):
        case.graphed(torch.full((2, 4), torch.nan, device=case.device), case.weight, 1)
    assert case.graphed.captures == 1 and case.graphed.reason is None


def test_outputs_keep_strides_and_what_they_share(device: torch.device) -> None:
    def function(x: torch.Tensor) -> tuple[Any, ...]:
        y = x + 1
        return y.t(), y[:, ::2], y[0], (x * 2)[0].expand(3, 4), None, 7, y.view(torch.int32)

    graphed = GraphedCall(function, device, (False,))
    for _ in range(4):
        x = torch.randn(2, 4, device=device)
        results, expected = graphed(x), function(x)
        assert isinstance(results, tuple) and results[4:6] == (None, 7)
        for result, wanted in zip(results, expected, strict=True):
            if isinstance(wanted, torch.Tensor):
                assert torch.equal(result, wanted) and result.stride() == wanted.stride()
        results[0].zero_()
        assert not results[1].any() and not results[2].any() and not results[6].any()
        assert results[3].all()
    assert graphed.captures == 1


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x, w: [x.add_(1)], "writes"),
        (lambda x, w: [x.mul_(1) + w], "writes"),  # the same values as before
        (lambda x, w: [x.detach().untyped_storage().fill_(0), w + 1][1:], "writes"),  # no version, as Inductor
        (lambda x, w: [x.view(-1)], "view"),
        (lambda x, w: [x], "view"),
        (lambda x, w: [w[1:]], "view"),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_functions_that_can_have_no_graph(
    device: torch.device,
    function: Callable[..., Any],
    why: str,
    inference: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "onlinequant")
    graphed = GraphedCall(function, device, (False, True))
    weight = torch.randn(4, device=device)
    for _ in range(3):
        with torch.inference_mode(inference):
            x = torch.rand(4, device=device) + 1
            own = x.clone()
            (result,), (expected,) = graphed(x, weight), function(own, weight)
            assert torch.equal(result, expected) and torch.equal(x, own)
            if inference and why == "writes" and graphed.reason is None:
                return  # an inference tensor has no version, and its values are as before: no caller could tell
    assert graphed.captures == 0
    assert graphed.reason is not None and why in graphed.reason
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.INFO


def test_inference_mode_may_come_and_go(case: Case) -> None:
    for inference in (True, True, False, True, False):
        with torch.inference_mode(inference):
            assert case.check().is_inference() == inference
    assert case.graphed.captures == 1


def test_refused_calls_do_not_keep_others_from_graphs(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "onlinequant")
    for _ in range(3):
        case.check()
        with torch.enable_grad():
            x = case.x().requires_grad_()
            case.check(x).sum().backward()
            assert x.grad is not None
        assert case.graphed.reason == "gradients are needed"
    case.check()
    assert case.graphed.captures == 1 and case.graphed.reason is None
    assert len(caplog.records) == 1


def test_tensors_elsewhere_are_refused(case: Case) -> None:
    elsewhere = "meta" if case.device.type == "cpu" else "cpu"
    graphed = GraphedCall(lambda x, t: [x + 1], case.device, (False, False))
    for _ in range(3):
        graphed(case.x(), torch.tensor(1.0, device=elsewhere))
    assert graphed.captures == 0 and graphed.reason is not None and "argument 1 is on " + elsewhere in graphed.reason
    weights = GraphedCall(lambda x, w: [x + 1], case.device, (False, True))
    for _ in range(3):
        weights(case.x(), torch.zeros(0, device=elsewhere))
    assert weights.captures == 0 and weights.reason is not None and "not all of its weights" in weights.reason


def test_no_capture_within_a_capture(case: Case, fake: FakeLane) -> None:
    fake.capturing = True
    for _ in range(3):
        case.check()
    assert case.graphed.captures == 0 and case.graphed.reason is not None


def test_a_failed_capture_is_said_once(case: Case, fake: FakeLane, caplog: pytest.LogCaptureFixture) -> None:
    fake.fails = True
    for _ in range(4):
        case.check()
    assert case.graphed.captures == 0
    assert case.graphed.reason == ("capturing failed: RuntimeError: operation not permitted when stream is capturing")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert case.function.runs == 4


def test_an_error_of_the_function_is_the_callers(device: torch.device) -> None:
    def function(x: torch.Tensor) -> None:
        raise ValueError("too large")

    graphed = GraphedCall(function, device, (False,))
    for _ in range(2):
        with pytest.raises(ValueError, match="too large"):
            graphed(torch.zeros(1, device=device))
    assert graphed.reason is None


def test_release(case: Case) -> None:
    for expected in (1, 2):
        for _ in range(3):
            case.check()
        assert case.graphed.captures == expected
        case.graphed.release()


def test_release_waits_for_replays_that_are_still_running(fake: FakeLane, device: torch.device) -> None:
    Case(device).graphed.release()
    assert fake.waits == 1


def test_threads(case: Case) -> None:
    other = Case(case.device)
    barrier = threading.Barrier(4)
    if case.device.type == "cuda":
        torch.cuda.synchronize()  # the weights, before other streams read them

    def run(number: int) -> None:
        mine = (case, other)[number % 2]
        barrier.wait(60)
        stream = torch.cuda.Stream() if number > 1 and case.device.type == "cuda" else None
        with torch.no_grad(), torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            for i in range(30):
                mine.check(torch.full((64 * (i % 3 + 1), 4), float(number + i), device=case.device))
            if stream:
                stream.synchronize()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert case.graphed.captures == other.graphed.captures == 3
    assert case.graphed.reason is None and other.graphed.reason is None


def _matmuls(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    for _ in range(20):
        x = (x @ weight).relu()
    return [x]


@cuda
@torch.no_grad()
def test_two_streams_take_turns() -> None:
    """Graphs share memory: were they to overlap, one would compute with what the other one left there."""
    device = torch.device("cuda", 0)
    weight = torch.randn(1024, 1024, device=device) / 23
    calls = [GraphedCall(_matmuls, device, (False, True)) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in calls]
    inputs = [torch.rand(1024, 1024, device=device) for _ in calls]
    expected = [_matmuls(x, weight)[0] for x in inputs]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for i, (call, stream) in enumerate(zip(calls, streams, strict=True)):
            with torch.cuda.stream(stream):
                results.append((call(inputs[i], weight)[0], expected[i]))
    torch.cuda.synchronize()
    for result, wanted in results:
        torch.testing.assert_close(result, wanted)
    assert [call.captures for call in calls] == [1, 1]


@cuda
@torch.no_grad()
def test_a_function_that_waits_for_the_gpu(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", 0)

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        return [x * x.sum().item()]

    good, bad = Case(device), GraphedCall(function, device, (False,))
    good.check()
    good.check()
    for _ in range(4):
        x = torch.randn(8, device=device)  # the random generator works on, too
        torch.testing.assert_close(bad(x)[0], function(x)[0])
    assert bad.captures == 0 and bad.reason is not None and "capturing failed" in bad.reason
    assert ("waits for the GPU" in bad.reason) == allocates_in_graph()  # there it must not even be tried
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for size in (2, 5, 5, 5):
        good.check(good.x(size, 4))  # replays what it had, captures what is new
    assert good.graphed.captures == 2
    assert not torch.cuda.is_current_stream_capturing()


@cuda
@torch.no_grad()
def test_memory_is_shared_and_given_back() -> None:
    device = torch.device("cuda", 0)

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        y = x.expand(64 * 2**20).contiguous() * 2  # 256 MiB and the same again
        return [y.view(-1, 64).sum(0)]

    def reserved() -> float:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        in_graphs = ctypes.c_uint64()
        if allocates_in_graph():  # torch does not know of the graphs' memory
            reserved_now = 2  # CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT
            assert not graph_memory._driver().cuDeviceGetGraphMemAttribute(0, reserved_now, ctypes.byref(in_graphs))
        return (torch.cuda.memory_reserved() + in_graphs.value) / 2**20

    before = reserved()
    calls = [GraphedCall(function, device, (False,)) for _ in range(3)]
    for call in calls:
        for _ in range(3):
            call(torch.ones(1, device=device))
    assert [call.captures for call in calls] == [1, 1, 1]
    assert 256 <= reserved() - before < 800
    for call in calls:
        call.release()
    assert reserved() - before < 64
    assert calls[0](torch.ones(1, device=device))[0][0] == 2 * 2**20
    assert calls[0](torch.ones(1, device=device))[0][0] == 2 * 2**20
    assert calls[0].captures == 2


def test_a_graph_counts_what_its_layers_clip(device: torch.device) -> None:
    kernel = clip_counting.counted(lambda xq, qparams: xq.float().sum())
    qparams = torch.tensor([1.0, 0.0, 1.0], device=device)

    def step(qparams: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return kernel(x.to(torch.int8), qparams) + kernel(x.to(torch.int8), qparams)

    call = counting_call.CountingCall(step, functools.partial(GraphedCall, device=device, fixed=[True, False]))
    x = torch.zeros(1000, device=device)
    for clipped in (0, 104, 54, 1000, 4):
        x.zero_()[:clipped] = 127
        result, seen = call(qparams, x)
        assert float(result) == 2 * 127 * clipped
        lowest, highest = 127 * (clipped == 1000), 127 * (clipped > 0)
        assert seen == {qparams.data_ptr(): clip_counting.Seen(clipped / 1000, lowest, highest, 4 / 1000)}
    assert call.run.captures == 1  # type: ignore[attr-defined]
    for size in (3000, 3000, 1000, 3000):
        _, seen = call(qparams, torch.full((size,), 127.0, device=device))
        assert seen == {qparams.data_ptr(): clip_counting.Seen(1, 127, 127, 4 / size)}
    assert call.run.captures == 2  # type: ignore[attr-defined]


def test_a_turn_within_a_turn_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And other threads wait until the outer one is over, also where that fails."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: mock.Mock())
    lane = _Lane.__new__(_Lane)
    lane.device, lane.lock, lane._done = torch.device("cuda", 0), threading.Lock(), mock.Mock()
    lane._last, lane._holder = None, None

    def take() -> bool:
        with lane.turn():
            return lane.lock.locked()

    def fail(pool: ThreadPoolExecutor) -> None:
        with lane.turn():
            with lane.turn():
                pass
            others.append(pool.submit(take))
            time.sleep(0.1)
            assert not others[0].done() and lane.lock.locked()
            raise KeyError

    others: list[Future[bool]] = []
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(KeyError):
            fail(pool)
        assert others[0].result(10)
        assert pool.submit(take).result(10), "a turn that is over is taken for one that goes on"
    assert not lane.lock.locked()
