"""How far what ComfyUI has saved is from what the baseline saved."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np


def keep(files: list[str], reference: Path) -> None:
    """Keep a baseline's latent image and picture for later comparisons."""
    shutil.rmtree(reference, ignore_errors=True)
    reference.mkdir(parents=True)
    for file in files:
        shutil.copy(file, reference)


def distances(files: list[str], reference: Path) -> dict[str, float]:
    """The latent image's relative error and the PSNR of all pictures or frames in dB, as far as sizes are equal."""
    kept = [str(file) for file in sorted(reference.iterdir())]
    result: dict[str, float] = {}
    ours, theirs = _latent(files), _latent(kept)
    if ours is not None and theirs is not None and ours.shape == theirs.shape:
        result["error"] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    ours, theirs = _pictures(files), _pictures(kept)
    if ours is not None and theirs is not None and ours.shape == theirs.shape:
        mean_square = float(np.mean((ours - theirs) ** 2))
        result["psnr"] = 10 * math.log10(255**2 / max(mean_square, 1e-5))  # 98 dB where they are equal
    return result


def _latent(files: list[str]) -> Any:
    from safetensors.numpy import load_file

    for file in files:
        if file.endswith(".latent"):
            return load_file(file)["latent_tensor"].astype(np.float64)
    return None


def _pictures(files: list[str]) -> Any:
    from PIL import Image, ImageSequence

    frames = []
    for file in sorted(file for file in files if not file.endswith(".latent")):
        with Image.open(file) as image:
            frames += [np.asarray(frame.convert("RGB"), np.float32) for frame in ImageSequence.Iterator(image)]
    return np.stack(frames) if frames else None
