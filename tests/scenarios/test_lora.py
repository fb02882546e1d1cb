"""LoRAs, the way that diffusers and PEFT apply them, and whole checkpoints: the 8-bit model follows the float one.

Dynamo has to trace again where a LoRA changes the modules, and only there. A change of nothing but weights compiles
nothing. Inductor is replaced by running the rewritten graph as it is, except in the last test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import onlinequant_backend as oq
from tests.helpers.eager_inductor import EagerInductor, dynamo_graphs
from tests.helpers.small import CLOSE
from tests.helpers.tiny import OPTIONS, noise, relative_error
from tests.helpers.tiny_unet import ADAPTED, tiny_unet

INPUTS = (noise(1, 4, 16, 16), torch.tensor(500.0), noise(1, 7, 32))
THRESHOLD = 6  # between the densities of the tiny UNet's self-attention and of a LoRA's branches of rank 8


def lora(unet: UNet2DConditionModel, seed: int, rank: int = 8, strength: float = 1) -> dict[str, torch.Tensor]:
    """A LoRA that reflects each layer's output in a random plane: at strength 1 another picture, from activations of
    the same size."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for name, layer in unet.named_modules():
        if name.endswith(ADAPTED):
            matrix = layer.weight.flatten(1)
            plane = torch.linalg.qr(torch.randn(len(matrix), rank, generator=generator))[0]
            up, down = -2 * strength * plane, plane.T @ matrix
            state_dict[f"{name}.lora_A.weight"] = down.view(rank, *layer.weight.shape[1:])
            state_dict[f"{name}.lora_B.weight"] = up.view(*up.shape, *[1] * (layer.weight.dim() - 2))
    return state_dict


def load(unet: UNet2DConditionModel, name: str, state_dict: dict[str, torch.Tensor], hotswap: bool = False) -> None:
    """What ``pipe.load_lora_weights`` does with the part of a LoRA that is for the UNet."""
    unet.load_lora_adapter(state_dict, prefix=None, adapter_name=name, hotswap=hotswap)


class Subject:
    """A compiled UNet beside its float self."""

    def __init__(self, inductor: EagerInductor, unet: UNet2DConditionModel | None = None, **options: Any) -> None:
        self.inductor = inductor
        self.unet = unet or tiny_unet()
        self.unet.compile(backend=oq.onlinequant, options={**OPTIONS, **options})
        self.picture = torch.zeros(())

    def expected(self, **kwargs: Any) -> torch.Tensor:
        """What the float model draws with the weights that it has now."""
        with torch.compiler.set_stance("force_eager"):
            picture: torch.Tensor = self.unet(*INPUTS, **kwargs).sample
        return picture

    def check(self, calls: int = 1, close: float = CLOSE, **kwargs: Any) -> None:
        """The picture is another one than at the last check, and the compiled model draws it."""
        expected = self.expected(**kwargs)
        assert relative_error(self.picture, expected) > 3 * CLOSE, "this change proves nothing"
        for _ in range(calls):
            result = self.unet(*INPUTS, **kwargs).sample
        assert relative_error(result, expected) < close
        # The first call may have been done again, in float, since its values did not fit the ranges.
        assert relative_error(self.unet(*INPUTS, **kwargs).sample, expected) < close
        assert oq.reports()[-1].phase == "quantized"
        self.picture = expected

    def start(self) -> None:
        """Observe, compile, and draw the first picture in 8 bit."""
        self.check(calls=3)

    def compiled(self) -> tuple[int, int]:
        """How many graphs Dynamo has traced, and how many 8-bit graphs were compiled."""
        return dynamo_graphs(), len(self.inductor.graphs)

    @contextlib.contextmanager
    def compiles(self, graphs: int) -> Iterator[None]:
        """As many graphs are traced and compiled in here."""
        traced, compiled = self.compiled()
        yield
        assert self.compiled() == (traced + graphs, compiled + graphs)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield


# --- branches beside the layers ---


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
def test_branches_are_layers_of_their_own_beside_8_bit_ones(threshold: float, inductor: EagerInductor) -> None:
    subject = Subject(inductor, linear_compute_density_threshold=threshold)
    subject.start()
    load(subject.unet, "a", lora(tiny_unet(), 1))
    with subject.compiles(1):
        exact = subject.unet(*INPUTS).sample  # the branches have to be observed
        assert relative_error(exact, subject.expected()) < 1e-5
        subject.check(calls=3)
    decisions = {decision.name: decision for decision in oq.reports()[-1].decisions}
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        layer = decisions[f"{attention}{name}.base_layer"]
        assert (layer.quantized, layer.reason) == (True, "selected")
        for branch in ("lora_A.a", "lora_B.a"):
            decision = decisions[f"{attention}{name}.{branch}"]
            assert decision.quantized == (threshold == 0)
            assert decision.quantized or "density" in decision.reason


def test_unloading_goes_back_to_the_first_graph(inductor: EagerInductor) -> None:
    subject = Subject(inductor)
    subject.start()
    load(subject.unet, "a", lora(tiny_unet(), 1))
    subject.check(calls=3)
    with subject.compiles(0):
        subject.unet.unload_lora()
        subject.check()


def test_one_of_two_adapters_is_deleted(inductor: EagerInductor) -> None:
    subject = Subject(inductor)
    load(subject.unet, "a", lora(tiny_unet(), 1))
    load(subject.unet, "b", lora(tiny_unet(), 2))
    subject.unet.set_adapters(["a", "b"], [0.5, 0.5])
    subject.start()
    subject.unet.delete_adapters("b")
    subject.check(calls=3)
    base_layers = [decision for decision in oq.reports()[-1].decisions if decision.name.endswith("to_q.base_layer")]
    assert base_layers and all(decision.quantized for decision in base_layers)


def test_strength_of_branches(inductor: EagerInductor) -> None:
    """It is a Python float, which Dynamo bakes in; whatever is compiled for it, the picture is right."""
    subject = Subject(inductor)
    load(subject.unet, "a", lora(tiny_unet(), 1))
    subject.start()
    for strength in (0.3, 0.9):
        subject.unet.set_adapters("a", strength)
        subject.check(calls=3)


def test_strength_of_one_call(inductor: EagerInductor) -> None:
    """What a pipeline does with ``cross_attention_kwargs={"scale": 0.3}``."""
    subject = Subject(inductor)
    load(subject.unet, "a", lora(tiny_unet(), 1))
    subject.start()
    for strength in (0.3, 0.9):
        subject.check(calls=3, cross_attention_kwargs={"scale": strength})


def test_a_slider_of_the_strength_compiles_once(inductor: EagerInductor) -> None:
    subject = Subject(inductor)
    load(subject.unet, "a", lora(tiny_unet(), 1))
    subject.start()
    with subject.compiles(1):  # the strength turns out to be no constant
        for step in range(10):
            subject.unet.set_adapters("a", 0.3 if step % 2 == 0 else 0.9 + step / 100)
            subject.check()


@pytest.mark.parametrize(("branches", "close"), [("float", CLOSE), ("8 bit", 2 * CLOSE)])
def test_hot_swap_compiles_nothing(branches: str, close: float, inductor: EagerInductor) -> None:
    """8-bit branches keep the ranges of the LoRA that they were observed with, so another one fits them less."""
    unet = tiny_unet()
    unet.enable_lora_hotswap(target_rank=16)
    load(unet, "a", lora(tiny_unet(), 1))
    subject = Subject(inductor, unet, exclude=("*.lora_?.*",) if branches == "float" else ())
    subject.start()
    with subject.compiles(0):
        for rank in (16, 4, 8):
            load(unet, "a", lora(tiny_unet(), rank, rank), hotswap=True)
            subject.check(close=close)
        # Their strengths are tensors now, so these can be changed too.
        for module in unet.modules():
            if "a" in getattr(module, "scaling", {}):
                module.scaling["a"].fill_(0.3)
        subject.check(close=close)


# --- fused into the layers ---


@pytest.mark.parametrize("safe_fusing", [False, True])
def test_fused_and_unloaded_loras_compile_nothing(safe_fusing: bool, inductor: EagerInductor) -> None:
    """Then the model is what it was but for its weights."""
    subject = Subject(inductor)
    subject.start()
    with subject.compiles(0):
        for rank in (8, 16, 4):
            load(subject.unet, "a", lora(subject.unet, seed=rank, rank=rank))
            subject.unet.fuse_lora(safe_fusing=safe_fusing)
            subject.unet.unload_lora()
            subject.check()


@pytest.mark.parametrize("safe_fusing", [False, True])
def test_changes_of_a_fused_lora_compile_nothing(safe_fusing: bool, inductor: EagerInductor) -> None:
    subject = Subject(inductor)
    load(subject.unet, "a", lora(tiny_unet(), 1))
    subject.unet.fuse_lora(safe_fusing=safe_fusing)
    subject.start()
    with subject.compiles(0):
        for strength in (0.3, 3.0):  # of the strength before
            subject.unet.unfuse_lora()
            subject.unet.fuse_lora(lora_scale=strength, safe_fusing=safe_fusing)
            subject.check()
        subject.unet.unfuse_lora()
        subject.unet.delete_adapters("a")
        load(subject.unet, "a", lora(tiny_unet(), 2, rank=4))
        subject.unet.fuse_lora(safe_fusing=safe_fusing)
        subject.check()


def test_fused_loras_of_other_names(inductor: EagerInductor) -> None:
    """Dynamo guards on PEFT's list of them, so it traces again for each list, whose weights are followed as well."""
    subject = Subject(inductor)
    load(subject.unet, "a", lora(tiny_unet(), 1))
    load(subject.unet, "b", lora(tiny_unet(), 2))
    subject.unet.set_adapters("a")
    subject.unet.fuse_lora()
    subject.start()
    for names, strengths, graphs in ((["a", "b"], [0.5, 0.5], 1), (["a"], [0.3], 0)):
        with subject.compiles(graphs):
            subject.unet.unfuse_lora()
            subject.unet.set_adapters(names, strengths)
            subject.unet.fuse_lora()
            subject.check()


def test_unfusing_brings_the_branches_back(inductor: EagerInductor) -> None:
    subject = Subject(inductor)
    load(subject.unet, "a", lora(tiny_unet(), 1))
    load(subject.unet, "b", lora(tiny_unet(), 2))
    subject.unet.set_adapters("a")
    subject.unet.fuse_lora()
    subject.start()
    with subject.compiles(1):
        subject.unet.unfuse_lora()
        subject.unet.set_adapters("b")
        subject.check(calls=3)
    with subject.compiles(0):
        subject.unet.set_adapters("a")
        subject.unet.fuse_lora()
        subject.check()


# --- ranges ---


@pytest.mark.parametrize("loaded", ["first", "later", "fused"])
def test_wider_ranges(loaded: str, inductor: EagerInductor) -> None:
    """A LoRA so strong that layers behind it read far larger numbers than before."""
    subject = Subject(inductor)
    if loaded != "first":
        subject.start()
    load(subject.unet, "a", lora(tiny_unet(), 1, strength=2))
    if loaded == "fused":
        subject.unet.fuse_lora()
        subject.unet.unload_lora()
    subject.check(calls=3)


# --- whole checkpoints ---


@pytest.mark.parametrize("assign", [False, True])
def test_replaced_layers(assign: bool, inductor: EagerInductor) -> None:
    """A fine-tuned part of a model is loaded over it: nothing is calibrated again."""
    subject = Subject(inductor)
    subject.start()
    weights = subject.unet.state_dict()
    plain = {
        name: weights[name].clone() for name in weights if name.endswith(tuple(f"{end}.weight" for end in ADAPTED))
    }
    with subject.compiles(0):
        for part in ({name: weight.flip(0) for name, weight in plain.items()}, plain):
            subject.unet.load_state_dict(part, strict=False, assign=assign)
            subject.check()


@pytest.mark.parametrize("assign", [False, True])
def test_another_checkpoint(assign: bool, inductor: EagerInductor) -> None:
    subject = Subject(inductor)
    subject.start()
    with subject.compiles(0):
        subject.unet.load_state_dict(tiny_unet(seed=5).state_dict(), assign=assign)
        subject.check(calls=3)


@pytest.mark.parametrize("assign", [False, True])
def test_another_checkpoint_with_other_ranges(assign: bool, inductor: EagerInductor) -> None:
    """Norms of trained models differ in size, and so do the inputs of the layers behind them."""
    subject = Subject(inductor)
    subject.start()
    other = tiny_unet(seed=5)
    for module in other.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.mul_(2)
    with subject.compiles(0):
        subject.unet.load_state_dict(other.state_dict(), assign=assign)
        subject.check(calls=3)


# --- the real Inductor ---


def test_fusing_with_inductor() -> None:
    """Regional compilation: the graph of a transformer block goes on with the weights that a LoRA leaves in it."""
    unet = tiny_unet()
    unet.compile_repeated_blocks(backend=oq.onlinequant, options=dict(OPTIONS))
    for _ in range(3):
        before = unet(*INPUTS).sample
    torch._dynamo.utils.counters.clear()
    load(unet, "a", lora(unet, 1))
    unet.fuse_lora()
    unet.unload_lora()
    result = unet(*INPUTS).sample
    with torch.compiler.set_stance("force_eager"):
        expected = unet(*INPUTS).sample
    assert relative_error(before, expected) > 3 * CLOSE
    assert relative_error(result, expected) < CLOSE
    assert relative_error(unet(*INPUTS).sample, expected) < CLOSE  # the first may have been done again, in float
    assert not dynamo_graphs()
    assert {report.phase for report in oq.reports()} == {"quantized"}
