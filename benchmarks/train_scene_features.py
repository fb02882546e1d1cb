"""Trains the classifier behind `onlinequant_backend/scenes/features.py`; `train_scenes.py` trains the rest.

python benchmarks/train_scene_features.py --minutes 2

It sees true pictures only: what looks different should look strange to it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.scene_batches import Clock, Scenes
from onlinequant_backend.progress import Progress
from onlinequant_backend.scenes.features import ANSWERS, WEIGHTS, Classifier
from onlinequant_backend.scenes.scene import PLACES

_PEAK_RATE, _BATCH = 3e-3, 64


def train(device: torch.device, minutes: float, seed: int, path: Path = WEIGHTS) -> float:
    """Write the weights, float16, into ``path``, and return the share of right answers in the last 50 batches."""
    torch.manual_seed(seed)
    classifier = Classifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_PEAK_RATE)
    scenes, clock = Scenes(device, seed), Clock(minutes)
    right: list[torch.Tensor] = []
    with Progress("training the classifier: per cent", 100) as progress:
        while clock.share < 1:
            optimizer.param_groups[0]["lr"] = _PEAK_RATE * (0.5 + 0.5 * math.cos(math.pi * clock.share)) + 1e-6
            pictures, _, code = scenes.batch(_BATCH)
            logits = classifier(pictures).split(ANSWERS, dim=1)
            wanted = answers(code).unbind(1)
            loss = torch.stack([F.cross_entropy(*pair) for pair in zip(logits, wanted, strict=True)]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            right.append(
                torch.stack([(x.argmax(1) == y).float().mean() for x, y in zip(logits, wanted, strict=True)]).mean()
            )
            if len(right) % 50 == 0:
                progress.advance(f"right {torch.stack(right[-50:]).mean():.4f}", to=int(100 * clock.share))
    save_file({name: tensor.half().cpu() for name, tensor in classifier.state_dict().items()}, path)
    path.chmod(0o644)
    return torch.stack(right[-50:]).mean().item()


def answers(code: torch.Tensor) -> torch.Tensor:
    """What the classifier should answer to each of its questions, int64 [N, 1 + 4 * 3]; 0 at a place for nothing."""
    places = code.new_zeros(len(code), len(PLACES), 3)
    for thing in (code[:, 1:5], code[:, 5:9]):
        row = (thing[:, 0] >= 0).nonzero()[:, 0]
        places[row, thing[row, 3]] = thing[row, :3] + 1
    return torch.cat([code[:, :1], places.flatten(1)], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    right = train(torch.device(options.device), options.minutes, options.seed)
    print(f"{100 * right:.2f}% of the answers are right; wrote {WEIGHTS}")


if __name__ == "__main__":
    main()
