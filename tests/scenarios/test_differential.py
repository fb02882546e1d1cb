"""Whatever a program does with its models, in any order: each call gives what the float model gives, or 8 bit of it.

Inductor is replaced by running the rewritten graph as it is, which is quick. The same few examples run each time; to
look for new ones, set ``ONLINEQUANT_DIFFERENTIAL_EXAMPLES`` to a number: 1,000 take about an hour.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.quantization import weight_quantization
from tests.helpers.hosted import hosted as hosted
from tests.helpers.small import compiled, forget_everything
from tests.helpers.tiny import Block, noise, relative_error

_EXAMPLES = int(os.environ.get("ONLINEQUANT_DIFFERENTIAL_EXAMPLES", "0"))
_STEPS = 25
# Of 8 bit in every layer, with what autocast to bfloat16 adds.
_CLOSE = 0.1

_models = st.integers(0, 2)
_layers = st.sampled_from(["conv_in", "block.conv", "block.to_q", "block.to_out", "time", "conv_out"])
_sizes = st.tuples(st.integers(1, 3), st.sampled_from([4, 8, 12]), st.sampled_from([8, 16]))
_seeds = st.integers(0, 3)


class Denoiser(nn.Module):
    """What a UNet has: an image, a time step, text, and a number that a user may turn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.block, self.time = Block(16), nn.Linear(8, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        time = self.time(torch.cos(t[:, None] * torch.arange(8, device=t.device) / 8).to(x.dtype))
        x = self.conv_in(x) + strength * time[:, :, None, None]
        return self.conv_out(F.silu(self.block(x)))


def denoiser(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser().eval().requires_grad_(False)


def variant(of: Denoiser) -> Denoiser:
    """Shares all parameters but those of two layers."""
    shared = {id(parameter): parameter for parameter in of.parameters()}
    other = copy.deepcopy(of, shared)  # type: ignore[arg-type]
    other.block.conv = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    other.conv_out = nn.Conv2d(16, 4, 3, padding=1).requires_grad_(False)
    return other


class Session(RuleBasedStateMachine):
    """Models of one program and the patches that they have at the moment."""

    options: ClassVar[dict[str, Any]] = {}

    @initialize(seed=_seeds)
    def begin(self, seed: int) -> None:
        forget_everything()
        first = denoiser(seed)
        self.models = [first, variant(first), denoiser(seed + 1)]
        self.steps = [compiled(model, **self.options) for model in self.models]
        self.put_back: list[Callable[[], object]] = []

    def check(self, which: int, x: torch.Tensor, t: torch.Tensor, strength: float = 1.0) -> None:
        model, step = self.models[which], self.steps[which]
        expected, found = model(x, t, strength), step(x, t, strength)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if expected.numel():
            error = relative_error(found, expected)
            assert error < _CLOSE, (error, [(report.phase, report.phase_reason) for report in oq.reports()])

    def inputs(self, which: int, size: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch, height, width = size
        dtype = self.models[which].conv_in.weight.dtype
        x = noise(batch, 4, height, width, seed=seed, dtype=dtype)
        return x, torch.full((batch,), 100.0 * seed + 1)

    def layer(self, which: int, name: str) -> Any:
        return self.models[which].get_submodule(name)

    @rule(which=_models, size=_sizes, seed=_seeds, times=st.integers(1, 4))
    def call(self, which: int, size: tuple[int, int, int], seed: int, times: int) -> None:
        for _ in range(times):
            self.check(which, *self.inputs(which, size, seed))

    @rule(which=_models, size=_sizes, strength=st.sampled_from([0.0, 0.5, 1.0, 1.5]))
    def turn(self, which: int, size: tuple[int, int, int], strength: float) -> None:
        self.check(which, *self.inputs(which, size, 0), strength)

    @rule(which=_models, size=_sizes)
    def call_with_autocast(self, which: int, size: tuple[int, int, int]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            self.check(which, *self.inputs(which, size, 0))

    @rule(which=_models)
    def call_with_nothing(self, which: int) -> None:
        self.check(which, *self.inputs(which, (0, 8, 8), 0))

    @rule(which=_models, size=_sizes, value=st.sampled_from([float("nan"), float("inf")]))
    def call_with_what_is_no_number(self, which: int, size: tuple[int, int, int], value: float) -> None:
        x, t = self.inputs(which, size, 0)
        x[0, 0, 0, 0] = value
        found, expected = self.steps[which](x, t), self.models[which](x, t)
        assert not torch.isfinite(found[0]).all() or torch.isfinite(expected[0]).all()
        if len(x) > 1:
            assert relative_error(found[1:], expected[1:]) < _CLOSE

    @rule(size=_sizes, others=st.lists(_models, min_size=2, max_size=3))
    def call_in_threads(self, size: tuple[int, int, int], others: list[int]) -> None:
        def run(which: int) -> None:
            with torch.no_grad():
                for seed in range(3):
                    self.check(which, *self.inputs(which, size, seed))

        with ThreadPoolExecutor(len(others)) as pool:
            for done in [pool.submit(run, which) for which in others]:
                done.result(120)

    @rule(which=_models, name=_layers, seed=_seeds)
    def add_in_place(self, which: int, name: str, seed: int) -> None:
        """A LoRA that is fused."""
        weight = self.layer(which, name).weight
        delta = noise(*weight.shape, seed=seed, dtype=weight.dtype) * weight.std()
        weight.add_(delta)
        self.put_back.append(lambda: weight.sub_(delta.to(weight.dtype)))

    @rule(which=_models, name=_layers, seed=_seeds)
    def replace(self, which: int, name: str, seed: int) -> None:
        """What ComfyUI does for as long as a run takes."""
        layer = self.layer(which, name)
        before = layer.weight
        layer.weight = nn.Parameter(before + noise(*before.shape, seed=seed, dtype=before.dtype) * before.std(), False)
        self.put_back.append(lambda: setattr(layer, "weight", before))

    @rule()
    def undo(self) -> None:
        if self.put_back:
            self.put_back.pop()()

    @rule(which=_models)
    def move(self, which: int) -> None:
        for parameter in self.models[which].parameters():
            parameter.data = parameter.data.clone()

    @rule(which=_models)
    def load(self, which: int) -> None:
        """Another checkpoint, into the same parameters."""
        self.put_back.clear()
        self.models[which].load_state_dict(denoiser(7 + which).to(self.layer(which, "time").weight.dtype).state_dict())

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        self.put_back.clear()
        self.models[2].to(dtype)

    @rule(which=_models, size=_sizes, name=_layers, after=st.integers(0, 3))
    def interrupt(self, which: int, size: tuple[int, int, int], name: str, after: int) -> None:
        """Ctrl-C while a change is followed, and the change is undone."""
        weight = self.layer(which, name).weight
        before = weight.clone()
        weight.mul_(-1)
        with interrupted(after), contextlib.suppress(KeyboardInterrupt):
            self.steps[which](*self.inputs(which, size, 0))
        weight.copy_(before)
        self.check(which, *self.inputs(which, size, 0))

    @rule(which=_models)
    def drop(self, which: int) -> None:
        self.put_back.clear()
        self.models[which] = variant(self.models[0]) if which == 1 else denoiser(which)
        self.steps[which] = compiled(self.models[which], **self.options)

    @rule()
    def let_go(self) -> None:
        for model in self.models:
            oq.release(model)

    @rule()
    def start_dynamo_over(self) -> None:
        torch._dynamo.reset()
        self.steps = [compiled(model, **self.options) for model in self.models]


class HostedSession(Session):
    """The same with float weights on the host."""

    options: ClassVar[dict[str, Any]] = {"float_weights": "host"}


@contextlib.contextmanager
def interrupted(after: int) -> Iterator[None]:
    """A ``KeyboardInterrupt`` after so many weights, in the middle of the next one."""
    quantize, left = weight_quantization.quantize_weight, [after]

    def stopped(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return quantize(*args)

    weight_quantization.quantize_weight = stopped
    try:
        yield
    finally:
        weight_quantization.quantize_weight = quantize


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
@torch.no_grad()
@pytest.mark.parametrize("session", [Session, HostedSession])
def test_any_order_of_events(session: type[Session], request: pytest.FixtureRequest) -> None:
    if session is HostedSession:
        request.getfixturevalue("hosted")
    settings = hypothesis.settings(
        max_examples=_EXAMPLES or 10,
        stateful_step_count=_STEPS,
        derandomize=not _EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(session, settings=settings)  # type: ignore[no-untyped-call]


@torch.no_grad()
@pytest.mark.usefixtures("inductor")
def test_a_few_values_beyond_the_range_of_another_model() -> None:
    """A variant takes over the ranges of its original, and its third step clips three of 1024 values."""
    session = Session()
    session.begin(0)
    session.interrupt(after=0, name="time", size=(1, 4, 8), which=0)
    for which in (0, 0, 1):
        for seed in range(3):
            session.check(which, *session.inputs(which, (1, 4, 16), seed))
