"""Float weights on the host: everything works as before, and the pictures are the same."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.analysis import traced_graph
from onlinequant_backend.errors import OnlineQuantError
from onlinequant_backend.quantization import host_weights
from onlinequant_backend.quantization.host_weights import HostMemoryError, host_bytes, is_on_host, move_to_host
from onlinequant_backend.quantization.weight_copy import Call
from onlinequant_backend.runtime.set_registry import known_sets
from tests.helpers.eager_inductor import EagerInductor, dynamo_graphs
from tests.helpers.hosted import hosted as hosted
from tests.helpers.hosted import on_host
from tests.helpers.small import CLOSE, X, compiled
from tests.helpers.tiny import net, noise, relative_error

pytestmark = pytest.mark.usefixtures("hosted")
WEIGHTS = {name for name, weight in net().named_parameters() if weight.dim() > 1}


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inference", [False, True])
def test_a_weight_keeps_all_but_its_address(layout: str, dtype: torch.dtype, inference: bool) -> None:
    with torch.inference_mode(inference):
        weight = nn.Parameter(noise(8, 6, 3, 3, dtype=dtype), requires_grad=False)
        if layout == "channels_last":
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        elif layout == "transposed":
            weight.data = weight.data.transpose(0, 1)

    def state() -> tuple[object, ...]:
        version = None if weight.is_inference() else weight._version
        return id(weight), weight.shape, weight.stride(), weight.dtype, weight.is_inference(), version

    values, before, address = weight.clone(), state(), weight.data_ptr()
    assert move_to_host([weight, weight]) == weight.nbytes
    assert is_on_host(weight) and weight.data_ptr() != address
    assert move_to_host([weight]) == 0 and host_bytes([weight, weight]) == weight.nbytes
    assert state() == before and torch.equal(weight, values)
    with torch.inference_mode(inference):
        weight.data += 1
        values += 1
    assert is_on_host(weight) and torch.equal(weight, values)
    assert host_weights.move_to_device([weight]) == weight.nbytes
    assert not is_on_host(weight) and state() == before and torch.equal(weight, values)


def test_what_cannot_be_moved_stays() -> None:
    with_gaps, expanded, meta = noise(8, 8)[:, ::2], noise(8, 1).expand(8, 8), torch.empty(8, 8, device="meta")
    assert move_to_host([with_gaps, expanded, meta, torch.empty(0)]) == 0
    assert not host_weights.are_any_on_host()


def test_weights_that_share_memory_stay_together(inductor: EagerInductor) -> None:
    """A change of the one is a change of the other."""
    flat = noise(2, 64, 64)
    assert move_to_host([flat[0]]) == 0
    models = net(), net()
    for model, where in zip(models, ("auto", "device"), strict=True):
        block = model.blocks[0]
        block.to_k.weight.data = block.to_q.weight.data
        step = compiled(model, float_weights=where)
        with torch.no_grad():
            for _ in range(3):
                step(X)
            block.to_q.weight.data.add_(0.3)
            result = [step(X) for _ in range(4)][-1]
        assert relative_error(result, model(X)) < CLOSE
        assert torch.equal(block.to_q.weight, block.to_k.weight)
    assert on_host(models[0]) == WEIGHTS - {"blocks.0.to_q.weight", "blocks.0.to_k.weight"}


class Quantized(torch.Tensor):
    """A weight of another library, without memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Quantized:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        assert func is torch.ops.aten.detach.default
        return cls(noise(8, 8))


def test_tensors_of_other_kinds_are_none_of_ours() -> None:
    kept = noise(64, 64)
    move_to_host([kept])
    module = nn.Module()
    module.weight = nn.Parameter(Quantized(noise(8, 8)), requires_grad=False)
    module.sparse = nn.Parameter(noise(8, 8).to_sparse(), requires_grad=False)
    assert oq.host_bytes(module) == 0
    assert move_to_host(list(module.parameters())) == 0
    assert host_weights.leave_on_host([*module.parameters(), torch.empty(4, device="meta")]) == 0


@torch.no_grad()
def test_a_graph_that_stays_in_float_moves_nothing_back_and_forth(inductor: EagerInductor) -> None:
    """Another graph of the same model is in 8 bit."""
    model, wide = net(), noise(2, 4, 16, 8)
    step, other = compiled(model), compiled(lambda x: model(x) + 1)
    for _ in range(4):
        step(X)
    inductor.error = RuntimeError("no compiler")
    for _ in range(3):
        assert torch.equal(other(wide), model(wide) + 1)
    inductor.error = None
    places = [weight.data_ptr() for weight in model.parameters()]
    for _ in range(3):
        assert relative_error(step(X), model(X)) < CLOSE
        assert torch.equal(other(wide), model(wide) + 1)
    assert [weight.data_ptr() for weight in model.parameters()] == places and not on_host(model)


def test_memory_is_used_again_and_given_back() -> None:
    host_weights.free_unused()
    weight = noise(64, 64)
    move_to_host([weight])
    address = weight.data_ptr()
    view = weight[0]
    del weight
    gc.collect()
    assert not host_weights._unused  # a view still reads it
    del view
    other = noise(64, 64, seed=2)
    expected = other.clone()
    move_to_host([other])
    assert other.data_ptr() == address and torch.equal(other, expected)
    del other
    oq.reset()
    assert not host_weights._unused and not host_weights.are_any_on_host()


def test_a_process_ends_in_silence() -> None:
    program = """
import sys, torch
from onlinequant_backend.quantization import host_weights
host_weights.supports, host_weights._LEAST = lambda device: True, 0
weights = sys.modules["kept"] = [torch.zeros(64, 64, dtype=torch.float32, device="cpu")]
assert host_weights.move_to_host(weights)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_too_little_host_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_weights, "free_memory", lambda: (10**9, 10**10))
    weight = noise(64, 64)
    with pytest.raises(HostMemoryError, match=r"of 10.0 GB of host memory 1.0 GB are free, and 10% are left to others"):
        move_to_host([weight])
    assert not is_on_host(weight)


def test_many_weights_have_their_memory_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [noise(64, 64), noise(64, 70)]
    move_to_host(before)
    addresses = {weight.data_ptr() for weight in before}
    del before
    looks = []

    def look() -> tuple[int, int]:
        looks.append(None)
        return 10**9, 10**9

    monkeypatch.setattr(host_weights, "free_memory", look)
    weights = [noise(64, width) for width in (64, 128, 256)]
    expected = [weight.clone() for weight in weights]
    assert move_to_host(weights) == sum(weight.nbytes for weight in weights)
    assert all(map(torch.equal, weights, expected))
    assert len(looks) == 1 and weights[0].data_ptr() in addresses
    move_to_host([noise(64, 70)])
    assert len(looks) == 2  # what did not fit was freed


def test_weights_move_as_far_as_their_memory_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    make = host_weights._Block.__init__

    def failing(self: host_weights._Block, size: int, device: torch.device) -> None:
        if size == 64 * 80 * 4:
            raise HostMemoryError("cannot be page-locked")
        make(self, size, device)

    monkeypatch.setattr(host_weights._Block, "__init__", failing)
    weights = [noise(64, 64), noise(64, 80)]
    with pytest.raises(HostMemoryError, match="cannot be page-locked"):
        move_to_host(weights)
    assert [is_on_host(weight) for weight in weights] == [True, False]
    assert not host_weights._unused


def test_memory_is_free_only_when_kernels_have_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(host_weights, "_synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("free"))
    move_to_host([noise(64, 64)])
    assert events[-2:] == ["wait", "free"]
    events.clear()
    left = iter([0, 10**9, 0])  # too little for both, enough for one
    monkeypatch.setattr(host_weights, "free_memory", lambda: (next(left), 10**9))
    with pytest.raises(HostMemoryError):
        move_to_host([noise(64, 65), noise(64, 66)])
    assert events[-2:] == ["wait", "free"]


@torch.no_grad()
@pytest.mark.parametrize("where", ["auto", "host"])
def test_pictures_are_the_same_and_weights_are_on_the_host(where: str, inductor: EagerInductor) -> None:
    model, plain = net(), net()
    step, other = compiled(model, float_weights=where), compiled(plain, float_weights="device")
    for call in range(4):
        assert torch.equal(step(X), other(X))
        assert on_host(model) == (WEIGHTS if call or where == "host" else set())
    assert oq.reports()[-1].phase == "quantized"
    assert not on_host(plain)
    assert (len(inductor.graphs), dynamo_graphs()) == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("where", ["auto", "device"])
def test_weights_that_are_copied_beside_long_work_leave_at_once(
    where: str, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    step = compiled(model, float_weights=where)
    monkeypatch.setattr(traced_graph, "_HIDDEN", 1)
    assert torch.equal(step(X), net()(X))
    assert on_host(model) == (WEIGHTS if where == "auto" else set())


@torch.no_grad()
def test_layers_that_stay_in_float_keep_their_weights_on_the_gpu(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model, exclude=("conv_in",), quantized_linear_percentage=50)
    for _ in range(4):
        step(X)
    in_8_bit = {f"{d.name}.weight" for d in oq.reports()[-1].decisions if d.quantized}
    assert 0 < len(in_8_bit) < len(WEIGHTS) - 1
    assert on_host(model) == in_8_bit
    generation = [weight.data_ptr() for weight in model.parameters()]
    wide = noise(2, 4, 8, 8)
    for _ in range(3):
        step(wide), step(X)
    assert [weight.data_ptr() for weight in model.parameters()] == generation


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.blocks[0].to_q.weight.data.add_(0.1),
        lambda model: model.blocks[0].to_q.weight.mul_(1.5),
        lambda model: setattr(model.blocks[0].to_q, "weight", nn.Parameter(noise(16, 16), False)),
        lambda model: model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()}),
        lambda model: model.to("meta").to_empty(device="cpu").load_state_dict(net(seed=3).state_dict()),
        lambda model: model.double().float(),
    ],
    ids=["data", "in place", "new parameter", "state dict", "moved away", "cast"],
)
def test_changes_are_followed(change: Callable[[nn.Module], object], inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model)
    for _ in range(3):
        step(X)
    change(model)
    for _ in range(5):
        result = step(X)
        assert relative_error(result, model(X)) < CLOSE
    assert not torch.equal(result, model(X))
    assert on_host(model) == WEIGHTS
    assert len(inductor.graphs) == 1


@torch.no_grad()
def test_copies_and_files_are_those_of_float(inductor: EagerInductor) -> None:
    model, plain = net(), net()
    step = compiled(model)
    for _ in range(3):
        step(X)
    expected = plain.state_dict()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    for found in (
        model.state_dict(),
        copy.deepcopy(model).state_dict(),
        pickle.loads(pickle.dumps(model)).state_dict(),
        torch.load(file),
    ):
        assert {name: torch.equal(value, expected[name]) for name, value in found.items()} == dict.fromkeys(
            expected, True
        )
    assert not on_host(copy.deepcopy(model))


@torch.no_grad()
def test_weights_that_another_thread_reads_stay(inductor: EagerInductor) -> None:
    model = net()
    step = compiled(model)
    step(X)
    (layers,) = (known.layers for known in known_sets)
    with ThreadPoolExecutor(1) as pool:
        call = Call()
        pool.submit(call.__enter__).result()
        call.layers = layers[:1]
        for _ in range(3):
            step(X)
        pool.submit(call.__exit__).result()
    assert oq.reports()[-1].phase == "quantized"
    assert on_host(model) == WEIGHTS - {"conv_in.weight"}


@torch.no_grad()
def test_without_host_memory_weights_stay(
    inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_weights, "free_memory", lambda: (10**9, 10**10))
    model = net()
    step = compiled(model)
    with caplog.at_level(logging.WARNING, "onlinequant"):
        for _ in range(3):
            assert relative_error(step(X), model(X)) < CLOSE
    assert not on_host(model) and oq.reports()[-1].phase == "quantized"
    assert [record.message for record in caplog.records if "stay on the GPU" in record.message]


@torch.no_grad()
def test_a_model_that_goes_on_in_float_has_its_weights_on_the_gpu(inductor: EagerInductor) -> None:
    inductor.error = RuntimeError("no compiler")
    model = net()
    step = compiled(model, float_weights="host")
    for _ in range(4):
        assert torch.equal(step(X), model(X))
    assert oq.reports()[-1].phase == "float"
    assert not on_host(model)


@torch.no_grad()
def test_another_process_starts_in_8_bit_with_weights_on_the_host(inductor: EagerInductor) -> None:
    results = []
    for where in ("device", "host", "auto"):
        oq.reset()
        torch._dynamo.reset()
        model = net()
        step = compiled(model, float_weights=where)
        results += [step(X) for _ in range(3)][-1:]
    assert oq.reports()[-1].cache_hit and on_host(model) == WEIGHTS
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_model_is_placed_without_its_large_weights() -> None:
    model = net()
    expected = model(X)
    assert oq.place(model, "cpu") is model
    assert on_host(model) == WEIGHTS and torch.equal(model(X), expected)


def test_a_model_is_taken_off_and_put_back_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    expected = model(X)
    oq.place(model, "cpu")
    assert oq.host_bytes(model) == sum(model.get_parameter(name).nbytes for name in WEIGHTS)
    places = [weight.data_ptr() for weight in model.parameters()]
    with monkeypatch.context() as without_gpu:
        without_gpu.setattr(host_weights, "supports", lambda device: False)
        oq.place(model, "cpu")
    assert [weight.data_ptr() for weight in model.parameters()] == places
    oq.place(model, "cpu")
    assert [weight.data_ptr() for weight in model.parameters()] == places and torch.equal(model(X), expected)


def test_a_device_that_cannot_read_host_memory_is_refused() -> None:
    with pytest.raises(
        OnlineQuantError, match=r"device is 'meta', which cannot read host memory: give an NVIDIA GPU or"
    ):
        oq.place(net(), "meta")
