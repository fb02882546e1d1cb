"""Whole sampling runs of a denoiser's variants, kept in a folder, and the figures about them."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import onlinequant_backend as oq
from benchmarks.fidelity_subjects import DRAWN, OBSERVED, Denoiser, Subject
from benchmarks.fidelity_variants import EAGER, Variant
from benchmarks.models import relative_error
from onlinequant_backend.report.image_quality import psnr, ssim
from onlinequant_backend.scenes.sheet import save_sheet

Row = dict[str, Any]
# Pictures on a sheet, and how many times as large as they are the differences there are drawn.
_SHOWN, _GAIN = 8, 4


class Recorder:
    """Calls a denoiser, and keeps what it was given in the call of this number, from 0."""

    def __init__(self, denoise: Denoiser, number: int) -> None:
        self.kept: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._denoise = denoise
        self._number = number
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._calls == self._number:
            self.kept = args, dict(kwargs)
        self._calls += 1
        return self._denoise(*args, **kwargs)


class Study:
    """One model, its variants' results and the figures about them, kept in a folder.

    Attributes:
        samplers: the first of them is observed.
        folder: where everything is kept.
    """

    def __init__(self, subject: Subject, samplers: Sequence[str], steps: int, pictures: int, folder: Path) -> None:
        self.subject = subject
        self.samplers = samplers
        self.folder = folder
        self._steps = steps
        self._pictures = pictures
        self._step: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._step_result = torch.empty(0)

    @torch.no_grad()
    def run(self, variant: Variant) -> None:
        """Draw with every sampler, and keep the results and the figures that need the model itself."""
        path = self.folder / f"{file_name(variant.name)}.pt"
        known = torch.load(path) if path.exists() else {"results": {}}
        missing = [sampler for sampler in self.samplers if sampler not in known["results"]]
        if not missing:
            return
        self._keep_a_step()
        start = time.perf_counter()
        with variant.denoiser(self.subject.model) as denoise:
            if variant.kind == "ours":
                with oq.sampling_run(self._steps):
                    self._draw(f"{variant.name}: observing", denoise, OBSERVED, self.subject.batch, self.samplers[0])
                known["layers"] = _layers()
            args, kwargs = self._step
            known["step"] = relative_error(denoise(*args, **kwargs)[0], self._step_result)
            for sampler in missing:
                title = f"{variant.name}: {sampler}"
                known["results"][sampler] = self._draw(title, denoise, DRAWN, self._pictures, sampler)
        known["s"] = time.perf_counter() - start
        torch.save(known, path)

    def _draw(self, title: str, denoise: Denoiser, seed: int, count: int, sampler: str) -> torch.Tensor:
        results = []
        for batch in self.subject.sample(denoise, seed, count, sampler, self._steps):
            results.append(batch.cpu())
            print(f"{title}, {sum(map(len, results))} of {count}", file=sys.stderr, flush=True)
        return torch.cat(results)

    def _keep_a_step(self) -> None:
        """What the float model is given, and answers, half way through a run."""
        if self._step_result.numel() == 0:
            recorder = Recorder(self.subject.model, self._steps // 2)
            self._draw("one step", recorder, OBSERVED + 1, self.subject.batch, self.samplers[0])
            args, kwargs = self._step = recorder.kept
            self._step_result = self.subject.model(*args, **kwargs)[0]

    def row(self, variant: Variant, sampler: str) -> Row:
        """The figures of a variant that has run."""
        known = self._known(variant)
        results, reference = known["results"][sampler], self._known(EAGER)["results"][sampler]
        pictures, expected = self.pictures(variant, sampler), self.pictures(EAGER, sampler)
        each = [psnr(picture, other, 1) for picture, other in zip(pictures, expected, strict=True)]
        return {
            **{name: known[name] for name in ("layers", "step", "s") if name in known},
            "result": relative_error(results, reference),
            "PSNR": statistics.fmean(each),
            "worst": min(each),
            "SSIM": ssim(pictures, expected, 1),
            **self.subject.judge(results, reference),
        }

    def pictures(self, variant: Variant, sampler: str) -> torch.Tensor:
        """What a variant has drawn, [N, 3, H, W] in [0, 1]."""
        reference = self._known(EAGER)["results"][sampler]
        return self.subject.pictures(self._known(variant)["results"][sampler], reference)

    def save_sheet(self, path: Path, shown: Sequence[Variant], sampler: str) -> None:
        """Some of the pictures of each variant, and how they differ from the reference's."""
        expected = 2 * self.pictures(EAGER, sampler)[:_SHOWN] - 1
        rows = {}
        for variant in shown:
            rows[variant.name] = pictures = 2 * self.pictures(variant, sampler)[:_SHOWN] - 1
            if variant != EAGER:
                rows[f"{variant.name}: off by, x{_GAIN}"] = _GAIN * (pictures - expected)
        save_sheet(path, rows, self.subject.captions(len(expected)))

    def _known(self, variant: Variant) -> dict[str, Any]:
        return dict(torch.load(self.folder / f"{file_name(variant.name)}.pt"))


def file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _layers() -> str:
    """What the model that was observed last has in 8 bit."""
    report = oq.reports()[-1]
    if report.phase != "quantized":
        raise SystemExit(f"The model is not in 8 bit: {report.phase_reason}")
    return f"{sum(decision.quantized for decision in report.decisions)} of {len(report.decisions)}"
