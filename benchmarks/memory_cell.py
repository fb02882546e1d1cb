"""What ``memory`` measures, and one cell of it: one model in one column, measured in this process."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import onlinequant_backend
from benchmarks.cells import emit, say
from benchmarks.gpu_step_cell import COMPILED, EAGER, OURS, TORCHAO, our_report, quantize_with_torchao
from benchmarks.gpu_timing import spread
from benchmarks.models import NATIVE, build, relative_error, seconds, step_inputs, thresholds
from benchmarks.peak_memory import Watch


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of ``benchmarks.models`` at its native size."""

    title: str
    batch: int
    dtype: torch.dtype
    tiny: dict[str, Any]


_TINY_UNET = {
    "block_out_channels": [32, 64],
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "transformer_layers_per_block": 1,
}
_TINY_SVD = {"block_out_channels": [32, 32, 64, 64], "num_attention_heads": [1, 1, 2, 2], "layers_per_block": 1}
_TINY_FLUX = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
_TINY_WAN = {"num_layers": 1, "num_attention_heads": 2, "ffn_dim": 256}
ROWS = {
    "sd15": Row("SD1.5, 512x512, batch 2", 2, torch.float16, _TINY_UNET),
    "sdxl": Row("SDXL, 1024x1024, batch 2", 2, torch.float16, _TINY_UNET),
    "svd": Row("SVD, 25 frames of 576x1024, batch 2", 2, torch.float16, _TINY_SVD),
    "flux": Row("FLUX.1, 1024x1024, batch 1", 1, torch.bfloat16, _TINY_FLUX),
    "wan": Row("Wan 14B, 81 frames of 480x832, batch 1", 1, torch.bfloat16, _TINY_WAN),
}
HALF = "onlinequant half"
COLUMNS = (EAGER, COMPILED, TORCHAO, OURS, HALF)
LOAD, OBSERVE, COMPILE, RUN, LORA, SECOND_SIZE = PHASES = (
    "load",
    "observe",
    "compile",
    "run",
    "LoRA",
    "second size",
)
OUT_OF_MEMORY = "out of memory"
OBSERVED = 2
CALLS = 10
MOST_CALLS = 5  # until the first result in 8 bit, after the observed ones
_PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0")
_RANK = 16


class Phases:
    """Keeps the peaks of a cell's phases."""

    def __init__(self, cell: dict[str, Any], watch: Watch) -> None:
        self._cell, self._watch = cell, watch

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Peaks of a phase that fails are not kept, and the cell says which it was."""
        self._watch.restart()
        try:
            yield
        except Exception as error:
            lines = str(error).splitlines() or [""]
            is_memory = OUT_OF_MEMORY in str(error)  # Inductor's errors wrap those of the allocator
            reason = OUT_OF_MEMORY if is_memory else f"{type(error).__name__}: {lines[0]}"
            self._cell["failures"][name] = reason
            if name != LORA or is_memory:
                raise
        else:
            self._cell["phases"][name] = self._watch.peaks()
        emit(self._cell)


class Lora:
    """Changes of the weights of all attention projections, of rank 16 and some percent of their size."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        self._changes = []
        for module in projections(model).values():
            dtype = module.weight.dtype
            up = torch.randn(module.out_features, _RANK, device=device, dtype=dtype)
            down = torch.randn(_RANK, module.in_features, device=device, dtype=dtype)
            self._changes.append((module, up, down.mul_(0.01 * module.in_features**-0.5)))

    def add(self, scale: float) -> None:
        """Add ``scale`` times the changes in place."""
        for module, up, down in self._changes:
            module.weight.add_((up @ down).to(module.weight.device), alpha=scale)


def projections(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers that a LoRA changes, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(_PROJECTIONS) and isinstance(module, torch.nn.Linear)
    }


class Subject:
    """A row's model in the host's memory, its inputs on the device, and what eager makes of them, in files of the run's
    folder. All cells have the same weights, which the device has made."""

    def __init__(self, options: argparse.Namespace) -> None:
        row, self._name, self._device = ROWS[options.row], options.row, options.device
        self._dtype, self._batch = (torch.float32 if self._device == "cpu" else row.dtype), row.batch
        self.size = (16, 16) if options.tiny else NATIVE[options.row]
        config = row.tiny if options.tiny else {}
        model, self.inputs = build(self._name, self._device, self._dtype, self._batch, size=self.size, config=config)
        self._result, self._weights = (options.folder / f"{options.row}.{name}.pt" for name in ("result", "weights"))
        if not self._result.exists():
            _save({name: module.weight.cpu() for name, module in projections(model).items()}, self._weights)
            _save(model(**self.inputs)[0].cpu(), self._result)
        self.model = model.to("cpu")

    def error(self, result: torch.Tensor) -> float:
        """The relative error of the step's result."""
        return relative_error(result.cpu(), torch.load(self._result))

    def change_of_weights(self) -> float:
        """By how much a weight differs at most from what it was."""
        before = torch.load(self._weights, mmap=True)
        changes = [module.weight.cpu() - before[name] for name, module in projections(self.model).items()]
        return max(float(change.abs().max()) for change in changes)

    def second_inputs(self) -> dict[str, Any]:
        """Those of about half the height. Three halvings must leave whole rows."""
        height, width = self.size
        return step_inputs(self._name, self._device, self._dtype, self._batch, (height // 16 * 8, width))


def _save(value: object, path: Path) -> None:
    part = path.with_suffix(f".{os.getpid()}")  # another cell may write the same file at the same time
    torch.save(value, part)
    part.replace(path)


def loaded(options: argparse.Namespace, model: torch.nn.Module) -> torch.nn.Module:
    """The model on the device, as a column holds it."""
    if options.column == HALF:
        return onlinequant_backend.place(model, options.device)
    model = model.to(options.device)
    if options.column == TORCHAO:
        quantize_with_torchao(model, only_large=False, tuned=not options.torchao_untuned)
    return model


def compiled(options: argparse.Namespace, model: torch.nn.Module) -> Callable[..., Any]:
    """The model as a column runs it."""
    if options.column == EAGER:
        return model
    if options.column not in (OURS, HALF):
        return torch.compile(model)
    given: dict[str, Any] = {"calibration_steps": OBSERVED}
    if options.column == HALF:
        given["float_weights"] = "host"
    if options.tiny:  # otherwise all layers are too small
        given |= {"precision": "int8", **thresholds(0)}
    return torch.compile(model, backend=onlinequant_backend.onlinequant, options={**given, **dict(options.option)})


def compile_calls(step: Callable[[], torch.Tensor], is_ours: bool) -> torch.Tensor:
    """The first result that is compiled, in 8 bit if it is ours."""
    for _ in range(MOST_CALLS if is_ours else 1):
        result = step()
        if is_ours and our_report()["phase"] == "quantized":
            break
    return result


@torch.no_grad()
def measure(options: argparse.Namespace) -> None:
    """Measure one cell in this process. Prints what is known so far as one JSON object, as often as more is known."""
    on_gpu = options.device == "cuda"
    watch = Watch(options.device, is_alone=not options.side_by_side)
    subject = Subject(options)
    cell: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__}
    cell |= {"source": watch.source, "phases": {}, "failures": {}}
    if on_gpu and options.capped:
        size = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.capped * 2**30 / size))
    watch.start()
    try:
        run_phases(options, subject, cell, Phases(cell, watch))
    except Exception:
        if not cell["failures"]:
            raise
        emit(cell)


def run_phases(options: argparse.Namespace, subject: Subject, cell: dict[str, Any], phase: Phases) -> None:
    """All phases one after the other; what they take goes into the cell."""
    device, is_ours = options.device, options.column in (OURS, HALF)

    def took(name: str, call: Callable[[], object]) -> None:
        cell[f"{name}_seconds"] = seconds(call, device)
        say(f"{name}: {cell[f'{name}_seconds']:.1f} s")

    with phase(LOAD):
        took("load", lambda: setattr(subject, "model", loaded(options, subject.model)))
    function = compiled(options, subject.model)

    def step() -> torch.Tensor:
        return function(**subject.inputs)[0]

    if is_ours:
        with phase(OBSERVE):
            took("observe", lambda: [step() for _ in range(OBSERVED)])
    with phase(COMPILE):
        took("compile", lambda: compile_calls(step, is_ours))
    with phase(RUN):
        cell["ms"] = spread(1e3 * seconds(step, device) for _ in range(CALLS))
        result = step()
    cell["relative_error"] = subject.error(result)
    del result
    if is_ours:
        cell["report"] = our_report()
    with phase(LORA):
        change_weights(Lora(subject.model, device), step, took)
    if LORA in cell["phases"]:
        cell["weights_change"] = subject.change_of_weights()
    if options.second_size:
        subject.inputs = subject.second_inputs()
        with phase(SECOND_SIZE):
            took("second", step)
            for _ in range(2):
                step()
    emit(cell)


def change_weights(
    lora: Lora, step: Callable[[], torch.Tensor], took: Callable[[str, Callable[[], object]], None]
) -> None:
    """Add a LoRA, and remove it again, each time up to the first result after it, and one more call."""
    step()  # gets the memory that was given back, which is not to be timed
    for name, scale in (("lora", 1.0), ("unlora", -1.0)):

        def change(scale: float = scale) -> torch.Tensor:
            lora.add(scale)
            return step()

        took(name, change)
        step()
