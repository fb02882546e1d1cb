"""When ranges are looked at, and what counts as clipped."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onlinequant_backend import ops
from onlinequant_backend.compilation import counting_call
from onlinequant_backend.kernels import clip_counting
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, Format
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.quantization.ranges import ActivationRange, clipped_share, freeze, wanted, widened
from onlinequant_backend.runtime import SamplingRun, drift
from tests.helpers.tiny import noise

FORMATS = pytest.mark.parametrize("format", [ONEDNN, INT8, FP8], ids=["uint8", "int8", "fp8"])


def due(schedule: drift.Schedule, calls: int, run: SamplingRun | None = None) -> list[int]:
    return [call for call in range(calls) if schedule.is_due(run)]


@pytest.mark.parametrize("every", [1, 4, 64, 100])
def test_one_call_of_every_so_many_is_checked(every: int) -> None:
    schedule = drift.Schedule(every)
    checked = due(schedule, 1000 * every)
    assert schedule.checks == len(checked) == pytest.approx(1000, abs=4)
    assert checked[0] < 8
    assert max(after - before for before, after in itertools.pairwise(checked)) < 2 * every


@pytest.mark.parametrize("every", [4, 16, 64])
def test_checks_meet_every_step_of_runs_of_any_length(every: int) -> None:
    checked = due(drift.Schedule(every), 1000 * every)
    for steps in range(1, 65):
        assert {call % steps for call in checked} == set(range(steps)), steps


@pytest.mark.parametrize("every", [4, 64])
@pytest.mark.parametrize("before", [0, 5, 1000])
def test_after_a_change_every_step_is_checked_within_two_runs(every: int, before: int) -> None:
    schedule = drift.Schedule(every)
    due(schedule, before)
    schedule.restart()
    checked = due(schedule, 64 + 1000 * every)
    assert checked[0] == 0
    for steps in range(1, 65):
        assert {call % steps for call in checked if call < 2 * steps} == set(range(steps)), steps
    assert len(checked) <= 64 + 1001


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 20, 150])
def test_a_known_run_is_checked_in_halves_after_a_change(steps: int) -> None:
    schedule = drift.Schedule(64)
    schedule.restart()
    first, second = (due(schedule, steps, SamplingRun(steps)) for _ in range(2))
    assert first == list(range(0, steps, 2)) and second == list(range(1, steps, 2))
    later = [call for _ in range(640) for call in due(schedule, steps, SamplingRun(steps))]
    assert set(later) == set(range(steps))
    assert len(later) == pytest.approx(10 * steps, abs=2)


def test_a_change_within_a_run_is_looked_for_at_once_and_in_two_whole_runs() -> None:
    schedule, run = drift.Schedule(64), SamplingRun(6)
    due(schedule, 3, run)
    schedule.restart()
    assert due(schedule, 3, run)[0] == 0
    assert [due(schedule, 6, SamplingRun(6)) for _ in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert sum(len(due(schedule, 6, SamplingRun(6))) for _ in range(10)) <= 2


def test_zero_switches_the_checks_off() -> None:
    schedule = drift.Schedule(0)
    schedule.restart()
    assert not due(schedule, 100)


def quantized(x: torch.Tensor, qparams: torch.Tensor, format: Format) -> torch.Tensor:
    return ops.quantize(x, qparams, format.activation, False)


def share_of(xq: torch.Tensor) -> float:
    return float(clip_counting.clipped(xq).float().mean())


def seen_in(xq: torch.Tensor) -> clip_counting.Seen:
    return clip_counting.Seen(share_of(xq), 0, 0)


def observed(x: torch.Tensor) -> ActivationRange:
    seen = ActivationRange()
    seen.update(x)
    return seen


@FORMATS
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("seed", range(4))
def test_ranges_that_have_changed_can_be_saved_and_restored(format: Format, method: str, seed: int) -> None:
    """However often they have: another process would observe anew."""
    random.seed(seed)
    layer, weight = Layer(None, format, method), noise(8, 16)
    for _ in range(2):
        layer.observe(noise(64, 16, seed=seed), weight)
        layer.count_call("")
    layer.freeze()
    for turn in range(20):
        x = random.choice([torch.abs, torch.relu, torch.neg])(noise(random.choice([2, 64]), 16, seed=turn))
        if random.random() < 0.5:  # just about as large as before
            assert layer.observed.maximum is not None
            x *= random.choice([0.97, 1.005, 1.2]) * float(layer.observed.maximum) / float(x.abs().max())
        else:
            x[0, 0] *= random.choice([1, 30, 300]) * random.choice([0.01, 1, 100])
        if random.random() < 0.25:
            values = quantized(x, layer.qparams, format).flatten()
            low, high = map(float, clip_counting._bounds_of(values))
            layer.step(clip_counting.Seen(share_of(values), low, high))
        else:
            layer.refit(x, has_drifted=random.random() < 0.5)
        saved, other = layer.save("fc", "linear", (8, 16)), Layer(None, format, method)
        assert other.fits(saved)
        other.restore(saved, 2, "")
        assert torch.equal(other.qparams, layer.qparams)


@FORMATS
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_what_was_observed_does_not_look_like_drift(format: Format, method: str) -> None:
    for x in (noise(64, 96), noise(64, 96).relu(), noise(64, 96).abs() + 1, torch.rand(64, 96), noise(4, 4)):
        seen = observed(x)
        qparams = freeze(seen, format, method)
        share = share_of(quantized(x, qparams, format))
        assert not clip_counting.has_drifted(clip_counting.Seen(share, 0, 0), clipped_share(seen, qparams, format))


@FORMATS
@pytest.mark.parametrize("sign", [1, -1])
def test_the_clipped_share_is_that_of_the_values_beyond_the_range(format: Format, sign: int) -> None:
    x = noise(1000, 50)
    seen = observed(x)
    qparams = freeze(seen, format, "minmax")
    expected = clipped_share(seen, qparams, format)
    assert expected < 0.001
    x[:100] = sign * 4 * x.abs().max()
    share = share_of(quantized(x, qparams, format))
    assert share == pytest.approx(0.1, abs=0.001)
    assert clip_counting.has_drifted(clip_counting.Seen(share, 0, 0), expected)


@FORMATS
@pytest.mark.parametrize("make", [torch.relu, lambda x: -x.relu(), lambda x: x.clamp(-1, 0.5), torch.sign])
def test_values_at_an_end_of_the_range_are_not_clipped(
    make: Callable[[torch.Tensor], torch.Tensor], format: Format
) -> None:
    x = make(noise(100, 100))
    seen = observed(x)
    qparams = freeze(seen, format, "minmax")
    assert share_of(quantized(x, qparams, format)) == 0
    assert clipped_share(seen, qparams, format) <= 2 / x.numel()


@FORMATS
@pytest.mark.parametrize("low", [-2.0, -1.3, -0.01, 0.0])
def test_values_beyond_either_end_are_clipped(low: float, format: Format) -> None:
    qparams = freeze(observed(torch.tensor([low, 2.0])), format, "minmax")
    reach = 2 if format.headroom > 1 else 1.02
    beyond = [2 * reach, low * reach - 0.02 if format is ONEDNN else -2 * reach]
    assert share_of(quantized(torch.tensor(beyond), qparams, format)) == 1
    assert share_of(quantized(torch.tensor([low, 2.0]), qparams, format)) == 0


@FORMATS
def test_widened_covers_both_ranges(format: Format) -> None:
    small, large = noise(100, 10), 3 * noise(100, 10) + 1
    ranges = [wanted(observed(x), format, "minmax") for x in (small, large)]
    narrow, wide = (freeze(observed(x), format, "minmax") for x in (small, large))
    assert torch.equal(widened(wide, *ranges[0], format), wide)
    assert torch.equal(widened(wide, *ranges[1], format), wide)
    both = widened(narrow, *ranges[1], format)
    for x in (small, large):
        back = (quantized(x, both, format).float() - both[1]) * both[2]
        assert float((back - x).abs().max()) <= (0.51 if format is not FP8 else 32) * float(both[2])


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
def test_many_values_at_the_end_of_a_wider_range_are_no_drift_again(method: str) -> None:
    layer = Layer(None, ONEDNN, method)
    layer.observe(torch.rand(64, 96), noise(32, 96))
    layer.freeze()
    larger = (4 * noise(64, 96)).clamp(max=3)
    assert clip_counting.has_drifted(seen_in(quantized(larger, layer.qparams, ONEDNN)), layer.clipped)
    layer.refit(larger)
    assert not clip_counting.has_drifted(seen_in(quantized(larger, layer.qparams, ONEDNN)), layer.clipped)
    assert layer.growth > 2


@pytest.mark.parametrize("format", [ONEDNN, INT8, FP8])
@pytest.mark.parametrize("values", [48, 9600])
def test_a_wider_range_has_room_for_the_next_values(format: Format, values: int) -> None:
    """Those of another seed or time step go a little farther, and each time would be a call in float."""
    layer = Layer(None, format, "minmax")
    x = noise(values // 48, 48)
    layer.observe(x, noise(32, 48))
    layer.freeze()
    layer.refit(4 * x)
    assert 4 <= layer.growth < 6
    largest = x.max().expand(values)  # all of them at the end
    assert share_of(quantized(4.4 * largest, layer.qparams, format)) <= layer.clipped
    assert clip_counting.has_drifted(seen_in(quantized(12 * largest, layer.qparams, format)), layer.clipped)


def test_a_kernel_is_counted_only_when_asked_for() -> None:
    seen = []
    kernel = clip_counting.counted(lambda xq, qparams, *rest: seen.append(rest))
    some, other = (torch.tensor([1.0, 3.0, 1.0]) for _ in range(2))
    xq = torch.tensor([0, 1, 253, 254], dtype=torch.uint8).repeat(1000)

    def step(number: int) -> int:
        kernel(xq, some, number)
        kernel(xq + 1, some, number)  # of one tensor, only the first that reads it counts
        kernel(torch.full((100,), 7, dtype=torch.uint8), other, number)
        return number

    step(1)
    result, seen_of = counting_call.CountingCall(step)(2)
    step(3)
    assert seen == [(1,)] * 3 + [(2,)] * 3 + [(3,)] * 3
    assert result == 2
    assert seen_of == {
        some.data_ptr(): clip_counting.Seen(0.5, 0, 254, 4 / 4000),
        other.data_ptr(): clip_counting.Seen(0, 7, 7, 3 / 100),
    }


def test_a_function_without_such_kernels_clips_nothing() -> None:
    assert counting_call.CountingCall(lambda x: x + 1)(2) == (3, {})


def test_replays_of_several_sizes_are_counted_by_their_own() -> None:
    qparams = torch.tensor([1.0, 3.0, 1.0])
    kernel = clip_counting.counted(lambda xq, qparams: len(xq))
    outcomes: dict[int, Any] = {}

    def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(xq: torch.Tensor) -> Any:
            if len(xq) not in outcomes:
                outcomes[len(xq)] = function(xq)
            return outcomes[len(xq)]

        return run

    call = counting_call.CountingCall(lambda xq: kernel(xq, qparams), replayed)
    for size in (1000, 3000, 1000, 500, 3000):
        seen = clip_counting.Seen(1, 254, 254, 4 / size)
        assert call(torch.full((size,), 254, dtype=torch.uint8)) == (size, {qparams.data_ptr(): seen})


@pytest.mark.parametrize(
    ("values", "beyond", "drifts"),
    [(1000, 4, False), (1000, 7, True), (64, 2, False), (64, 3, True), (4, 0, False), (4, 1, True), (1, 1, True)],
)
def test_a_handful_of_many_values_is_no_drift_except_in_doubt(values: int, beyond: int, drifts: bool) -> None:
    xq = torch.full((values,), 100, dtype=torch.uint8)
    xq[:beyond] = 254
    kernel = clip_counting.counted(lambda xq, qparams: None)
    _, found = counting_call.CountingCall(lambda: kernel(xq, torch.tensor([1.0, 3.0, 1.0])))()
    (seen,) = found.values()
    assert clip_counting.has_drifted(seen, 0.0) is drifts
    assert clip_counting.has_drifted(seen, 0.0, is_in_doubt=True) is (beyond > min(2, values // 64))


def test_doubts_end_until_the_next_change() -> None:
    """Inputs that grow at each step would keep a whole picture in float."""
    schedule = drift.Schedule(64)

    def doubts(calls: int) -> int:
        found = 0
        for _ in range(calls):
            schedule.is_due(have_changed=True)
            if schedule.is_in_doubt:
                found += 1
                schedule.settle()
                schedule.restart(in_float=True)
        return found

    assert doubts(20) == 0
    for _ in range(2):
        schedule.restart()
        assert doubts(20) == 3
    schedule.restart()
    for _ in range(2):
        due(schedule, 6, SamplingRun(6))
        assert schedule.is_in_doubt  # since the change
    due(schedule, 6, SamplingRun(6))
    assert not schedule.is_in_doubt
    schedule.doubt()
    assert schedule.is_in_doubt


@FORMATS
def test_what_is_not_finite_counts(format: Format) -> None:
    x = torch.zeros(100)
    qparams = freeze(observed(noise(100, 10)), format, "minmax")
    x[20:30] = torch.nan
    x[70:80] = -torch.inf
    assert share_of(quantized(x, qparams, format)) == pytest.approx(0.2)


def test_results_of_any_structure_are_looked_at() -> None:
    fine = torch.ones(2)
    assert drift.is_finite({"a": [fine, 3, None], "b": torch.arange(2)})
    assert not drift.is_finite((fine, {"x": torch.tensor([1.0, torch.inf])}))
