"""The mode that gives up float weights: the same pictures, little memory, and an error where floats are needed."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.errors import FreedWeightsError
from onlinequant_backend.quantization.freed_weights import CANARIES, free_values
from tests.helpers.eager_inductor import EagerInductor, dynamo_graphs
from tests.helpers.small import CLOSE, X, compiled
from tests.helpers.tiny import Net, net, noise, relative_error


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    torch._dynamo.utils.counters.clear()


def freed_net(**options: object) -> tuple[Net, object, torch.Tensor]:
    """A model that has given up its float weights, how to call it, and what it drew before."""
    model = net()
    expected = model(X)
    step = compiled(model, free_float_weights=True, **options)
    for _ in range(3):
        step(X)
    assert oq.reports()[-1].phase == "quantized"
    return model, step, expected


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_a_hollow_weight_keeps_all_but_its_memory(layout: str) -> None:
    weight = nn.Parameter(noise(8, 6, 3, 3), requires_grad=False)
    if layout == "channels_last":
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        weight.data = weight.data.transpose(0, 1)
    other = nn.Parameter(noise(4, 4), requires_grad=False)
    before = (id(weight), weight.shape, weight.stride(), weight.dtype, weight._version)
    freed = free_values([weight, other])
    assert (id(weight), weight.shape, weight.stride(), weight.dtype, weight._version) == before
    assert weight.isnan().sum() == weight.numel() - CANARIES
    assert weight.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert freed == other.nbytes
    assert free_values([]) == 0


def test_a_hollow_weight_made_in_inference_mode_still_knows_that_it_has_no_version() -> None:
    with torch.inference_mode():
        weight = nn.Parameter(noise(8, 6), requires_grad=False)
    free_values([weight])
    assert weight.is_inference()


@torch.no_grad()
def test_pictures_stay_and_memory_goes(inductor: EagerInductor) -> None:
    model, step, expected = freed_net()
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert all(weight.isnan().any() for weight in weights)
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    for _ in range(3):
        assert relative_error(step(X), expected) < CLOSE  # type: ignore[operator]
    assert (len(inductor.graphs), dynamo_graphs()) == (1, 1)


@torch.no_grad()
def test_layers_that_stay_in_float_keep_their_weights(inductor: EagerInductor) -> None:
    model, step, expected = freed_net(exclude=("conv_in", "*.to_v"))
    assert not model.conv_in.weight.isnan().any() and not model.blocks[0].to_v.weight.isnan().any()
    assert model.conv_out.weight.isnan().any()
    assert relative_error(step(X), expected) < CLOSE  # type: ignore[operator]


@torch.no_grad()
def test_other_sizes_and_modes_need_no_float_weights(inductor: EagerInductor) -> None:
    reference = net()
    model, step, _ = freed_net()
    for shape in ((2, 4, 8, 8), (1, 4, 12, 8), (1, 4, 8, 8)):
        x = noise(*shape)
        assert relative_error(step(x), reference(x)) < CLOSE  # type: ignore[operator]
    with torch.inference_mode():
        assert relative_error(step(X.clone()), reference(X)) < CLOSE  # type: ignore[operator]
    assert {report.phase for report in oq.reports()} == {"quantized"}
    del model


@torch.no_grad()
def test_a_layer_too_thin_at_another_size_goes_on_in_8_bit(inductor: EagerInductor) -> None:
    """Fewer rows make a linear less dense than the threshold, but its float weight is gone."""
    reference = net()
    threshold = 3.0
    _, step, _ = freed_net(linear_compute_density_threshold=threshold, shapes="static")
    freed = {decision.name for decision in oq.reports()[-1].decisions if decision.quantized}
    x = noise(1, 4, 2, 2)
    assert relative_error(step(x), reference(x)) < 3 * CLOSE  # type: ignore[operator]
    thin = [d for d in oq.reports()[-1].decisions if d.kind == "linear" and d.density < threshold]
    assert thin and all(d.name in freed and d.quantized and "free_float_weights" in d.reason for d in thin)


def add(weight: nn.Parameter) -> None:
    weight.add_(1)


def add_to_data(weight: nn.Parameter) -> None:
    weight.data += 1


def copy_into_data(weight: nn.Parameter) -> None:
    weight.data.copy_(torch.ones(weight.shape))


def add_almost_nothing(weight: nn.Parameter) -> None:
    weight.data += 1e-6


def new_data(weight: nn.Parameter) -> None:
    weight.data = torch.ones(weight.shape)


@torch.no_grad()
@pytest.mark.parametrize("change", [add, add_to_data, add_almost_nothing, copy_into_data, new_data])
def test_a_changed_weight_raises(change: object, inductor: EagerInductor) -> None:
    model, step, _ = freed_net()
    change(model.blocks[0].conv.weight)  # type: ignore[operator]
    for _ in range(2):
        with pytest.raises(FreedWeightsError, match="free_float_weights=False"):
            step(X)  # type: ignore[operator]


@torch.no_grad()
def test_a_replaced_weight_raises(inductor: EagerInductor) -> None:
    """A ComfyUI LoRA: a new Parameter, made from what the model had."""
    model, step, _ = freed_net()
    model.blocks[0].conv.weight = nn.Parameter(model.blocks[0].conv.weight + 1, requires_grad=False)
    for _ in range(2):
        with pytest.raises(FreedWeightsError):
            step(X)  # type: ignore[operator]


@torch.no_grad()
def test_a_whole_new_checkpoint_is_another_model(inductor: EagerInductor) -> None:
    model, step, _ = freed_net()
    other = net(seed=5)
    expected = other(X)
    model.load_state_dict(other.state_dict(), assign=True)
    del other
    gc.collect()
    for _ in range(4):
        assert relative_error(step(X), expected) < CLOSE  # type: ignore[operator]


@torch.no_grad()
def test_a_failing_compile_gives_nothing_up(inductor: EagerInductor) -> None:
    inductor.error = RuntimeError("no compiler")
    model = net()
    expected = model(X)
    step = compiled(model, free_float_weights=True)
    for _ in range(4):
        assert torch.equal(step(X), expected)
    assert not model.conv_in.weight.isnan().any()


@torch.no_grad()
def test_a_compile_that_fails_later_raises(inductor: EagerInductor) -> None:
    """The float graph would draw NaN."""
    _, step, _ = freed_net()
    inductor.error = RuntimeError("no compiler")
    with pytest.raises(FreedWeightsError):
        step(noise(2, 4, 8, 8))  # type: ignore[operator]
