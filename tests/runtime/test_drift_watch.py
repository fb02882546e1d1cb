"""What becomes of calls that have outgrown the observed ranges."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import onlinequant_backend as oq
from onlinequant_backend.analysis.traced_graph import TracedGraph
from onlinequant_backend.kernels import clip_counting
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.report.report import VISIBLE
from onlinequant_backend.runtime import drift, sampling_run
from onlinequant_backend.runtime.cache_entry import Entry
from onlinequant_backend.runtime.drift_watch import DriftWatch
from onlinequant_backend.runtime.extents import Extents
from onlinequant_backend.runtime.sample import Sample
from onlinequant_backend.runtime.set_registry import known_sets
from onlinequant_backend.runtime.weight_state import WeightState
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.small import CLOSE, WIDE, compiled, forget_everything, small
from tests.helpers.tiny import OPTIONS, net, noise, relative_error

X = noise(1, 4, 8, 8)


def started(model: torch.nn.Module, **options: Any) -> Callable[..., torch.Tensor]:
    """Compiled, observed and in 8 bit."""
    step = compiled(model, **{"drift_check_every": 4, **options})
    for _ in range(3):
        step(X)
    return step


@pytest.fixture
def unseen_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are not looked at, as where only activations change."""
    monkeypatch.setattr(Extents, "have_changed", lambda extents, args: False)


@torch.no_grad()
@pytest.mark.usefixtures("unseen_inputs")
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_outgrown_ranges_are_widened_without_a_compile(method: str, inductor: EagerInductor) -> None:
    model = net()
    step, expected = started(model, calibration_method=method), model(4 * X)
    report, errors = oq.reports()[-1], list[float]()
    for _ in range(6):
        errors.append(relative_error(step(4 * X), expected))
        assert report.phase == ("quantized" if errors[-1] else "float")
    assert errors[0] > CLOSE  # nothing has changed that would make one look sooner
    assert 0 in errors[:4]  # the call that finds out is done again in float
    assert 0 < errors[-1] < CLOSE
    assert len(inductor.graphs) == 1
    assert report.widened["conv_in"] == pytest.approx(4, rel=0.2)
    assert "widened" in report.table()


@torch.no_grad()
def test_what_was_observed_goes_on_in_8_bit(inductor: EagerInductor) -> None:
    step = started(net())
    for seed in range(20):
        x = noise(1, 4, 8, 8, seed=1)
        assert relative_error(step(x), net()(x)) > 0, seed
    assert not oq.reports()[-1].widened


@torch.no_grad()
def test_changed_weights_are_checked_at_once(inductor: EagerInductor) -> None:
    model = net()
    step = started(model)
    model.conv_in.weight.mul_(6)
    assert relative_error(step(X), model(X)) == 0
    assert 0 < relative_error(step(X), model(X)) < CLOSE
    assert len(inductor.graphs) == 1


@torch.no_grad()
def test_weights_that_change_after_the_last_observed_call_are_checked_at_once(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model, drift_check_every=64)
    for _ in range(2):
        step(X)
    model.conv_in.weight.mul_(6)
    for _ in range(3):
        picture = step(X)
        assert relative_error(picture, model(X)) < CLOSE
    assert not torch.equal(picture, model(X))


@torch.no_grad()
@pytest.mark.parametrize("strength", [6.0, -6.0])
def test_a_number_beyond_those_before_is_checked_at_once(
    strength: float, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    step = torch.compile(lambda x, strength: model(x * strength), backend=oq.onlinequant, options=OPTIONS)
    for number in (1.0, 1.0, 1.0, *[1.1] * 8, *[1.0] * 2):  # the second one makes it an input of the graph
        step(X, number)
    for _ in range(3):
        picture = step(X, strength)
        assert relative_error(picture, model(X * strength)) < CLOSE
    assert not torch.equal(picture, model(X * strength))
    monkeypatch.setattr(drift.Schedule, "restart", lambda _: pytest.fail("these numbers are known"))
    for number in (strength / 2, 1.0, strength):
        step(X, number)


@torch.no_grad()
def test_a_number_beyond_those_observed_is_checked_at_once(inductor: EagerInductor) -> None:
    model = net()
    step = torch.compile(lambda x, strength: model(x * strength), backend=oq.onlinequant, options=OPTIONS, dynamic=True)
    for number in (1.0, 1.1, 6.0, 6.0):
        picture = step(X, number)
        assert relative_error(picture, model(X * number)) < CLOSE
    assert not torch.equal(picture, model(X * number))


@torch.no_grad()
@pytest.mark.parametrize("are_late", [False, True])
def test_inputs_are_not_looked_at_where_checks_are_switched_off(
    are_late: bool, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Extents, "are_late", lambda _, device: are_late)
    monkeypatch.setattr(Extents, "begin", lambda extents, args, device: lambda: extents.have_changed(args))
    model = small()
    step = started(model, drift_check_every=0)
    large = 8 * noise(1, 4, 8, 8, seed=2)
    for _ in range(3):
        assert relative_error(step(large), model(large)) > CLOSE
    assert not oq.reports()[-1].widened


@torch.no_grad()
@pytest.mark.parametrize("are_late", [False, True])
@pytest.mark.parametrize("calls", [1, 60, 200])
def test_inputs_that_are_larger_from_a_call_on_are_found_at_once(
    calls: int, are_late: bool, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if are_late:  # the answer comes after the step, as on a GPU
        monkeypatch.setattr(Extents, "are_late", lambda _, device: True)
        monkeypatch.setattr(Extents, "begin", lambda extents, args, device: lambda: extents.have_changed(args))
    model = small()
    step = started(model, drift_check_every=64)
    for _ in range(calls):
        step(X)
    large = 8 * noise(1, 4, 8, 8, seed=2)
    for _ in range(3):
        assert relative_error(step(large), model(large)) < CLOSE
    assert oq.reports()[-1].widened["conv_in"] == pytest.approx(8, rel=0.3)


@torch.no_grad()
@pytest.mark.usefixtures("unseen_inputs")
@pytest.mark.parametrize(("steps", "large"), [(4, 1), (9, 8)])
@pytest.mark.parametrize("is_run_known", [False, True])
def test_a_step_that_a_change_has_made_larger_is_found_within_two_runs(
    is_run_known: bool, steps: int, large: int, inductor: EagerInductor
) -> None:
    model = net()
    step = started(model, drift_check_every=64)
    model.conv_out.weight.mul_(-1)
    errors = []
    for _ in range(3):
        with sampling_run(steps) if is_run_known else contextlib.nullcontext():
            for number in range(steps):
                x = 4 * X if number == large else X
                errors.append(relative_error(step(x), model(x)))
    assert max(errors[2 * steps :]) < CLOSE


@torch.no_grad()
def test_without_float_weights_ranges_are_doubled_until_they_fit(inductor: EagerInductor) -> None:
    model, other = net(), net()
    step = started(model, free_float_weights=True, drift_check_every=1)
    for _ in range(6):
        result = step(4 * X)
    assert relative_error(result, other(4 * X)) < 2 * CLOSE
    assert oq.reports()[-1].widened["conv_in"] == pytest.approx(4)


@torch.no_grad()
def test_without_float_weights_the_call_that_finds_out_is_right(inductor: EagerInductor) -> None:
    model, other = net(), net()
    step = started(model, free_float_weights=True, drift_check_every=1)
    assert relative_error(step(4 * X), other(4 * X)) < 2 * CLOSE


@torch.no_grad()
@pytest.mark.parametrize("factor", [4, torch.inf])
def test_where_ranges_cannot_be_widened_calls_are_in_float(
    factor: float, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    step, large = started(model, drift_check_every=1), factor * X
    monkeypatch.setattr(Layer, "refit", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    for _ in range(3):
        assert torch.equal(step(large).nan_to_num(7), model(large).nan_to_num(7))
    assert 0 < relative_error(step(X), model(X)) < CLOSE


@torch.no_grad()
def test_where_the_memory_is_too_small_for_float_ranges_are_doubled_until_they_fit(
    inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    step, expected = started(model, drift_check_every=1), model(4 * X)

    def fail(*_arguments: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(DriftWatch, "_observe", fail)
    monkeypatch.setattr(DriftWatch, "_run_float", fail)
    for _ in range(3):
        assert 0 < relative_error(step(4 * X), expected) < 2 * CLOSE
    assert oq.reports()[-1].widened["conv_in"] == pytest.approx(4)


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_comes_out_as_in_float(value: float, inductor: EagerInductor) -> None:
    model = net()
    step, x = started(model), X.clone()
    x[0, 1, 2, 3] = value
    for _ in range(3):
        assert torch.equal(step(x).isfinite(), model(x).isfinite())
        assert 0 < relative_error(step(X), model(X)) < CLOSE  # and is forgotten


@torch.no_grad()
def test_a_few_values_that_are_not_finite_are_the_same_as_in_float(inductor: EagerInductor) -> None:
    model = small()
    step, x = started(model), X.clone()
    x[0, 1, 2, 3] = torch.nan
    expected = model(x)
    assert expected.isnan().sum() == 36
    for _ in range(4):
        assert torch.equal(step(x).nan_to_num(7), expected.nan_to_num(7))


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layer", ["conv_in", "linear", "conv_out"])
def test_weights_that_are_not_finite_show(value: float, layer: str, inductor: EagerInductor) -> None:
    model = small()
    step = started(model)
    model.get_submodule(layer).weight[1] = value
    expected = model(X)
    assert not expected.isfinite().all()
    for _ in range(6):
        result = step(X)
        assert torch.equal(result.isfinite(), expected.isfinite())
        finite = expected.isfinite()
        assert not finite.any() or relative_error(result[finite], expected[finite]) < CLOSE


@torch.no_grad()
def test_a_half_precision_overflow_shows(inductor: EagerInductor) -> None:
    model = small().half()
    x = X.half()
    step = compiled(model, drift_check_every=64)
    for _ in range(3):
        step(x)
    model.conv_in.weight.mul_(2.0**17)
    expected = model(x)
    assert not expected.isfinite().all()
    for _ in range(20):
        assert torch.equal(step(x).isfinite(), expected.isfinite())


@torch.no_grad()
def test_an_error_that_shows_is_said(inductor: EagerInductor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "onlinequant"):
        fine = net()
        step = started(fine)
        report = oq.reports()[-1]
        assert report.error == pytest.approx(relative_error(step(X), fine(X)), rel=1e-3)
        assert not report.warnings() and not caplog.records
        # Pixels that stand out, which no factor of a channel evens out.
        coarse, x = net(), X.clone()
        x[:, :, 0, 0] *= 1e4
        step = compiled(coarse, calibration_method="minmax")
        for _ in range(4):
            step(x)
    report = oq.reports()[-1]
    assert report.error is not None and report.error > VISIBLE
    (warning,) = report.warnings()
    assert warning in " ".join(report.table().split())
    assert [warning in record.message for record in caplog.records] == [True]


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: Any) -> Any:
        raise error

    return raise_it


def samples() -> list[Sample]:
    sets = [weights for weights in known_sets if isinstance(weights, WeightState)]
    return [weights.sample for weights in sets if weights.sample is not None]


@torch.no_grad()
def test_no_call_is_kept_that_nobody_will_compare(inductor: EagerInductor) -> None:
    def observed(**options: Any) -> tuple[torch.nn.Module, Callable[..., torch.Tensor]]:
        model = net()
        step = compiled(model, **options)
        step(X), step(X)
        return model, step

    observed(max_error=1.0)
    assert not samples()
    kept = observed()
    assert len(samples()) == 1
    kept[1](X)
    assert not samples()
    kept = observed()
    del kept
    gc.collect()
    assert not samples()
    inductor.error = RuntimeError("no compiler")
    kept = observed(calibration_method="minmax")
    assert len(samples()) == 1
    kept[1](X), kept[1](X)
    assert oq.reports()[-1].phase == "float" and not samples()


@torch.no_grad()
@pytest.mark.parametrize("change", ["nothing", "a weight", "a weight in float", "the size", "no memory"])
def test_the_error_is_that_of_the_last_observed_call(
    change: str, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a float step beside the 8-bit copies, unless the last observed call says nothing any more."""
    float_steps = []
    in_float = TracedGraph.in_float
    monkeypatch.setattr(TracedGraph, "in_float", lambda *given: float_steps.append(1) or in_float(*given))
    model, observed, x = net(), X.clone(), noise(1, 4, 8, 8, seed=1)
    if change == "no memory":
        monkeypatch.setattr(Sample, "of", raising(torch.OutOfMemoryError("out of memory")))
    step = compiled(model, quantized_linear_percentage=0 if change == "a weight in float" else 100)
    step(x)
    step(observed).mul_(2)  # a sampler may work in place
    observed.mul_(2)
    if change == "a weight":
        model.conv_in.weight.mul_(1.5)
    if change == "a weight in float":
        model.blocks[0].to_out.weight.mul_(1.5)
    called = torch.cat([x, x], dim=2) if change == "the size" else x
    while (error := oq.reports()[-1].error) is None:  # the first call after a change may run in float
        result = step(called)
    if change == "nothing":
        result, called = step(X), X
    assert error == pytest.approx(relative_error(result, model(called)), rel=1e-3)
    assert bool(float_steps) == (change != "nothing")


@torch.no_grad()
def test_an_error_that_a_wider_range_has_made_is_said(
    inductor: EagerInductor, caplog: pytest.LogCaptureFixture
) -> None:
    model = small()
    step = started(model)
    first = oq.reports()[-1].error
    for x in (1000 * X, X, X):
        result = step(x)
    error = relative_error(result, model(X))
    assert first is not None and first < CLOSE < VISIBLE < error
    assert oq.reports()[-1].error == pytest.approx(error)
    assert any("differs" in record.message for record in caplog.records)
    step(1000 * X)  # is no reason to ask again
    assert oq.reports()[-1].error == pytest.approx(error)


@torch.no_grad()
def test_zero_never_widens(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model, drift_check_every=0)
    for _ in range(3):
        step(X)
    for _ in range(70):
        assert relative_error(step(4 * X), model(4 * X)) > CLOSE


@torch.no_grad()
def test_a_result_that_is_not_finite_is_done_again_in_float(
    inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    step = started(model)
    graph = inductor.graphs[0]
    forward = graph.forward
    monkeypatch.setattr(graph, "forward", lambda *args: tuple(x * torch.nan for x in forward(*args)))
    with caplog.at_level(logging.WARNING, "onlinequant"):
        for _ in range(3):
            assert relative_error(step(X), model(X)) == 0
    assert sum("not finite" in record.message for record in caplog.records) == 1


@torch.no_grad()
def test_a_model_that_is_not_finite_in_float_either_is_left_alone(
    inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    model.conv_out.bias[0] = torch.nan
    step = started(model)
    assert step(X)[:, 0].isnan().all()
    monkeypatch.setattr(DriftWatch, "_follow", None)  # it fails if it is asked for again
    assert step(X)[:, 0].isnan().all()
    assert 0 < relative_error(step(X)[:, 1:], model(X)[:, 1:]) < CLOSE
    assert not caplog.records[1:]


@torch.no_grad()
def test_what_is_random_draws_no_more_than_eager_does(inductor: EagerInductor) -> None:
    """The first step in 8 bit is compared with float, which would draw once more."""

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return model(x) + torch.randn_like(x)

    model = net()
    step = torch.compile(noisy, backend=oq.onlinequant, options=OPTIONS)
    torch.manual_seed(0)
    expected = [noisy(X) for _ in range(5)]
    torch.manual_seed(0)
    for picture in expected:
        assert relative_error(step(X), picture) < CLOSE
    assert oq.reports()[-1].error is None


def pieces(*shape: int) -> torch.Tensor:
    """Positive values that pile up at the upper end of their range."""
    return noise(*shape).abs().clamp(max=1)


@torch.no_grad()
@pytest.mark.usefixtures("unseen_inputs")
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (noise(64, 16).abs(), -noise(64, 16).abs()),
        (-noise(64, 16).abs(), noise(64, 16).abs()),
        (noise(64, 16).abs(), noise(64, 16)),
        (pieces(64, 16), 3 * pieces(64, 16)),
        (pieces(64, 16), pieces(64, 16) - 2),
        (noise(1, 4), 8 * noise(1, 4)),
        (noise(1, 1), -8 * noise(1, 1)),
        (100 * noise(64, 16), 0.001 * noise(64, 16)),
        (noise(64, 16), 1e-5 * noise(64, 16)),
        (pieces(64, 16), 1e-5 * pieces(64, 16)),
    ],
)
def test_inputs_that_do_not_fit_their_range_are_noticed(
    before: torch.Tensor, after: torch.Tensor, precision: str, inductor: EagerInductor
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(before.shape[1], 8, bias=False).requires_grad_(False)
    step = compiled(model, drift_check_every=4, precision=precision)
    for _ in range(5):
        step(before)
    assert not oq.reports()[-1].widened
    errors = [relative_error(step(after), model(after)) for _ in range(8)]
    assert max(errors[4:]) < CLOSE
    # What was observed, and what has come since, is right from the first check on.
    for _ in range(3):
        errors = [relative_error(step(x), model(x)) for x in (before, before, before, before, after, after)]
    assert max(errors[:4]) < CLOSE
    assert len(inductor.graphs) == 1


@torch.no_grad()
@pytest.mark.usefixtures("unseen_inputs")
def test_a_range_is_not_narrowed_again_and_again(inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    step = started(model)
    for x in (*[0.01 * X] * 8, *[X] * 8):
        step(x)
    monkeypatch.setattr(Layer, "refit", lambda layer, x, has_drifted: pytest.fail("both are known"))
    for x in [0.01 * X, X] * 20:
        step(x)


@torch.no_grad()
def test_zeros_change_no_range(inductor: EagerInductor) -> None:
    model = small()
    step = started(model, drift_check_every=1)
    for _ in range(3):
        assert relative_error(step(0 * X), model(0 * X)) < CLOSE
    assert relative_error(step(X), model(X)) < CLOSE
    assert "conv_in" not in oq.reports()[-1].widened


@torch.no_grad()
def test_without_float_weights_ranges_are_narrowed_until_they_fit(inductor: EagerInductor) -> None:
    model, other = small(), small()
    step = started(model, free_float_weights=True, drift_check_every=1)
    for _ in range(2):
        result = step(0.02 * X)
    assert relative_error(result, other(0.02 * X)) < 2 * CLOSE
    assert oq.reports()[-1].widened["conv_in"] < 0.05
    assert "narrowed" in oq.reports()[-1].table()


@torch.no_grad()
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_without_float_weights_what_is_not_finite_changes_no_range(
    value: float, precision: str, inductor: EagerInductor
) -> None:
    model, other = small(), small()
    step = started(model, free_float_weights=True, drift_check_every=1, precision=precision)
    x = X.clone()
    x[0, 0, 0, 0] = value
    assert step(x).isnan().any()
    assert not oq.reports()[-1].widened
    assert relative_error(step(X), other(X)) < CLOSE


@torch.no_grad()
def test_ranges_that_were_narrowed_are_found_by_the_next_process(inductor: EagerInductor) -> None:
    step = started(small(), drift_check_every=1)
    step(0.01 * X)
    step(WIDE)  # after whose compile all is saved
    forget_everything()
    step = compiled(small())
    step(WIDE)
    assert oq.reports()[-1].cache_hit


class Plain(torch.nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"max_error": 0.2}], ids=["", "a budget, which the first one is selected by"])
def test_each_model_that_shares_a_graph_is_compared_with_float(
    options: dict[str, Any], inductor: EagerInductor
) -> None:
    fine, coarse = Plain(), Plain()
    coarse.linear.weight.mul_(1e-3)[:, 0] = 50
    x = noise(32, 16)
    small_channel = torch.cat([x[:, :1] / 1e3, x[:, 1:]], 1)
    for model in (fine, coarse):
        model.compile(backend=oq.onlinequant, options={**OPTIONS, **options})
    for model, given in ((fine, x), (coarse, small_channel)):
        for _ in range(4):
            model(given)
    (report,) = oq.reports()
    assert report.error is not None and report.error > VISIBLE
    assert report.error == pytest.approx(relative_error(coarse(small_channel), coarse.forward(small_channel)), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("known", [0.01, VISIBLE, None])
def test_a_step_that_another_process_has_compared_is_not_done_in_float_again(
    known: float | None, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless there is something to be said of it."""
    started(net())(X)
    forget_everything()
    monkeypatch.setattr(Entry, "load_error", lambda _: known)
    compared: list[float] = []
    monkeypatch.setattr(DriftWatch, "_compare", lambda *_: compared.append(1))
    step = compiled(net())
    assert 0 < relative_error(step(X), net()(X)) < CLOSE
    assert (len(compared), oq.reports()[-1].error) == (known != 0.01, known)


@torch.no_grad()
def test_a_range_that_has_become_far_wider_is_compared_with_float(inductor: EagerInductor) -> None:
    """One spike has widened it, which the result does not show, and leaves all else a few steps."""
    model, spike = Plain(), noise(32, 16)
    spike[0] = 300 * noise(16)
    step = compiled(torch.nn.Sequential(model, torch.nn.Tanh()), drift_check_every=1)
    for _ in range(4):
        step(noise(32, 16))
    report = oq.reports()[-1]
    assert report.error is not None and report.error < VISIBLE
    for _ in range(4):
        step(spike)
    assert report.error == pytest.approx(relative_error(step(spike), model(spike).tanh()), rel=0.1)


class Sum(torch.nn.Module):
    """Two layers, each of an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(y)


@torch.no_grad()
@pytest.mark.usefixtures("unseen_inputs")
def test_what_errors_of_other_layers_push_beyond_a_range_is_no_drift(
    inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few values that differ, one is much. Where other ranges grow a little at each step, none would be in 8 bit."""
    torch.manual_seed(0)
    model = Sum().requires_grad_(False)
    step = compiled(model, drift_check_every=1)
    x, y = noise(64, 64, seed=1), noise(64, 64, seed=2)
    for _ in range(3):
        step(x, y)
    pushed = clip_counting.Seen(0.002, 1, 254)  # of the first layer in 8 bit; in float its range is right

    def drifted(weights: WeightState, *_: object) -> dict[int, clip_counting.Seen]:
        return {0: pushed} if weights.layers[0].clipped < pushed.clipped else {}

    monkeypatch.setattr(WeightState, "drifted", drifted)
    errors = [relative_error(step(x, y * 1.05**i), model(x, y * 1.05**i)) for i in range(1, 6)]
    assert errors[0] == 0  # the call that finds out
    assert all(0 < error < CLOSE for error in errors[1:])


@torch.no_grad()
@pytest.mark.usefixtures("unseen_inputs")
@pytest.mark.parametrize("beyond", [8, 30])
def test_few_values_far_beyond_a_range_are_found_at_a_change(beyond: int, inductor: EagerInductor) -> None:
    """As few as this are no drift elsewhere, but nobody knows how far beyond the range they are."""
    model, spikes = Sum().requires_grad_(False), torch.zeros(256, 64)
    spikes.view(-1)[torch.randperm(spikes.numel(), generator=torch.Generator().manual_seed(0))[:beyond]] = 40.0
    assert not clip_counting.has_drifted(clip_counting.Seen(beyond / spikes.numel(), 0, 0), 0.0)

    def forward(x: torch.Tensor, strength: float) -> torch.Tensor:
        return model(x + strength * spikes, x)

    step = torch.compile(forward, backend=oq.onlinequant, options=OPTIONS, dynamic=True)
    x = noise(256, 64)
    for strength in (0.5, 0.6, 0.7, 0.55):
        step(x, strength / 40)
    for _ in range(3):
        picture = step(x, 1.0)
        assert relative_error(picture, forward(x, 1.0)) < CLOSE
    assert not torch.equal(picture, forward(x, 1.0))
    assert list(oq.reports()[-1].widened) == ["a"]


@torch.no_grad()
@pytest.mark.usefixtures("unseen_inputs")
@pytest.mark.parametrize("may_repeat", [True, False])
def test_values_that_have_changed_without_a_trace_are_checked_at_once(
    may_repeat: bool, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where another model that shares the weight may have quantized it again already: nothing else tells
    that activations may be others."""
    model = net()
    step = started(model, drift_check_every=64)
    if not may_repeat:
        monkeypatch.setattr(TracedGraph, "may_repeat", False)
    answers, restarts, restart = [False], list[bool](), drift.Schedule.restart
    monkeypatch.setattr(WeightState, "begin_check", lambda state: True)
    monkeypatch.setattr(WeightState, "end_check", lambda state: answers.pop() if answers else True)
    monkeypatch.setattr(drift.Schedule, "restart", lambda schedule: restarts.append(True) or restart(schedule))
    assert 0 < relative_error(step(X), model(X)) < CLOSE
    assert not answers
    assert restarts == [True]
