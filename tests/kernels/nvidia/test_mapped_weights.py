"""Weights in mapped host memory on a real GPU; without one, ``tests/quantization/test_host_weights`` emulates it."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.quantization import host_weights
from onlinequant_backend.quantization.host_weights import is_on_host, leave_on_host, load_on_host, move_to_host
from onlinequant_backend.quantization.weight_streaming import stream, stream_first
from tests.helpers.small import CLOSE
from tests.helpers.tiny import OPTIONS, net, noise, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(host_weights, "_LEAST", 0)
    yield
    gc.collect()
    host_weights.free_unused()


def hosted(*shape: int, seed: int = 1) -> tuple[nn.Parameter, torch.Tensor]:
    """A weight on the host, and its values on the GPU."""
    weight = nn.Parameter(noise(*shape, seed=seed, dtype=torch.float16).to(CUDA), requires_grad=False)
    values = weight.detach().clone()
    move_to_host([weight])
    assert is_on_host(weight)
    return weight, values


def test_the_gpu_reads_and_writes_it_where_it_is() -> None:
    allocated = torch.cuda.memory_allocated()
    weight, values = hosted(512, 512)
    assert torch.cuda.memory_allocated() - allocated == values.nbytes and weight.device == CUDA
    x = noise(64, 512, dtype=torch.float16).to(CUDA)
    assert torch.equal(F.linear(x, weight), F.linear(x, values))
    for change in (lambda w: w.data.add_(1), lambda w: w.mul_(2), lambda w: w.data.copy_(values.cpu() + 3)):
        change(weight), change(values)
        torch.cuda.synchronize()
        assert torch.equal(weight, values) and torch.equal(weight.cpu(), values.cpu())


def test_copies_files_and_moves_have_its_values() -> None:
    weight, values = hosted(64, 32)
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    for found in (copy.deepcopy(weight), torch.load(file)["weight"], weight.clone(), weight.to("cpu").to(CUDA)):
        assert torch.equal(found, values) and not is_on_host(found)


def test_it_is_taken_off_the_gpu_and_put_back_in_place() -> None:
    weight, values = hosted(64, 32)
    address = weight.data_ptr()
    assert leave_on_host([weight]) == weight.nbytes
    assert weight.device.type == "cpu" and weight.data_ptr() == address and torch.equal(weight, values.cpu())
    weight.add_(1)
    assert load_on_host([weight], CUDA) == weight.nbytes
    assert weight.device == CUDA and weight.data_ptr() == address and torch.equal(weight, values + 1)
    other = nn.Parameter(noise(64, 32), requires_grad=False)
    expected = other.clone()
    load_on_host([other], CUDA)
    assert is_on_host(other) and torch.equal(other.cpu(), expected)


def test_copies_ahead_are_ready_when_they_are_read() -> None:
    weights = [hosted(1024, 1024, seed=seed) for seed in range(12)]
    x = noise(256, 1024, dtype=torch.float16).to(CUDA)
    for _ in range(3):
        for number, (weight, values) in enumerate(weights):
            upcoming = [other for other, _ in weights[1:6]] if not number else [w for w, _ in weights[number + 5 :][:1]]
            read = (stream if number else stream_first)(weight, *upcoming)
            assert not is_on_host(read)
            assert torch.equal(F.linear(x, read), F.linear(x, values))


def test_copies_ahead_take_no_more_memory_while_the_gpu_is_behind() -> None:
    """The host queues many steps before the GPU has run the first one."""
    weights = [hosted(1024, 1024, seed=seed)[0] for seed in range(8)]
    x = noise(64, 1024, dtype=torch.float16).to(CUDA)
    stream_first(weights[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda._sleep(1_000_000_000)
    for _ in range(50):
        for number, weight in enumerate(weights):
            read = (stream if number else stream_first)(weight, *weights[number + 1 : number + 2])
            F.linear(x, read)
    assert torch.cuda.max_memory_allocated() - before < 5 * weights[0].nbytes


def test_blocks_are_unregistered_before_their_memory_is_freed() -> None:
    """Else CUDA refuses to lock the pages again."""
    for _ in range(20):
        weight, _ = hosted(256, 256)
        del weight
        gc.collect()
        host_weights.free_unused()
    torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)


@torch.no_grad()
@pytest.mark.parametrize("where", ["auto", "host", "placed"])
def test_a_model_on_a_gpu_runs_with_its_weights_on_the_host(where: str) -> None:
    model, x = net(dtype=torch.float16, blocks=2), noise(2, 4, 16, 16, dtype=torch.float16).to(CUDA)
    expected = copy.deepcopy(model).to(CUDA)(x)
    model = oq.place(model, CUDA) if where == "placed" else model.to(CUDA)
    options = {**OPTIONS, "precision": "auto", "selection": "density", "float_weights": where.replace("placed", "host")}
    step = torch.compile(model, backend=oq.onlinequant, options=options)
    for _ in range(5):
        assert relative_error(step(x), expected) < CLOSE
    assert oq.reports()[-1].phase == "quantized"
    quantized = {f"{d.name}.weight" for d in oq.reports()[-1].decisions if d.quantized}
    assert {name for name, weight in model.named_parameters() if is_on_host(weight)} >= quantized
    for block in model.blocks:
        block.to_q.weight.data += 0.1
    for _ in range(3):
        assert relative_error(step(x), model(x)) < CLOSE
    model.to("cpu").to(CUDA)
    assert relative_error(step(x), model(x)) < CLOSE
