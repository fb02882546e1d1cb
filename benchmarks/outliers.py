"""Outliers as trained models have them, put into a denoiser whose random weights lack them.

Two kinds, since these two make one scale for a whole tensor coarse:

- **Channels.** Of every GroupNorm and LayerNorm, a few channels come out ``scale`` times as large (20 to 100 by
  default, spread evenly over the logarithm). The layers that read them have the matching columns of their weights
  divided by ``scale``. Behind a LayerNorm, and a GroupNorm without SiLU, the model computes exactly what it did. Behind
  SiLU about the same: there a large channel sees ``silu(a x) / a``, which is about ``relu(x)`` and never further than
  0.28 from ``silu(x)``.
- **The start token.** The first token of the text, the same for all captions, becomes ``factor`` times as long, as
  CLIP's is, and ``to_k`` and ``to_v`` shrink by as much along its direction: its keys and values stay what they were.
  The other tokens lose what they have in common with it, a few percent for random directions.

This is the hard case: a trained model's weights do not all shrink where activations grow, so there the large channels
also carry more of the output. Here they matter no more than others, but still decide the scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

# A norm and the layers that alone read its output, in diffusers' blocks; the attributes' names tell blocks apart.
_READERS = (
    ("norm1", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("norm2", ("attn2.to_q",)),
    ("norm3", ("ff.net.0.proj",)),
    ("norm_in", ("ff_in.net.0.proj",)),
    ("norm1", ("conv1",)),
    ("norm2", ("conv2",)),
    ("norm", ("proj_in",)),
    ("conv_norm_out", ("conv_out",)),
)


@dataclasses.dataclass(frozen=True)
class Outlier:
    """A channel of the norm called ``norm`` that comes out ``scale`` times as large."""

    norm: str
    channel: int
    scale: float


@torch.no_grad()
def enlarge_channels(
    model: nn.Module,
    count: int = 3,
    smallest: float = 20,
    largest: float = 100,
    seed: int = 0,
    kinds: tuple[type[nn.Module], ...] = (nn.GroupNorm, nn.LayerNorm),
) -> list[Outlier]:
    """Enlarge ``count`` channels of every norm of these kinds, in place, and shrink the weights that read them."""
    generator = torch.Generator().manual_seed(seed)
    outliers = []
    for name, norm, readers in _norms(model, kinds):
        channels = torch.randperm(len(norm.weight), generator=generator)[:count]
        scales = smallest * (largest / smallest) ** torch.rand(len(channels), generator=generator)
        factors = torch.ones(len(norm.weight)).index_copy(0, channels, scales).to(norm.weight)
        norm.weight.mul_(factors)
        norm.bias.mul_(factors)
        for reader in readers:
            reader.weight.div_(factors.view(1, -1, *[1] * (reader.weight.dim() - 2)))
        outliers += [Outlier(name, *pair) for pair in zip(channels.tolist(), scales.tolist(), strict=True)]
    return outliers


@torch.no_grad()
def enlarge_start_token(model: nn.Module, text: torch.Tensor, factor: float = 30) -> torch.Tensor:
    """``text`` [N, tokens, channels] with a first token ``factor`` times as long as the mean of the others, the same in
    all captions; the weights of ``model`` that read it change in place."""
    start = text[0, 0].float()
    direction = start / start.norm()
    length = factor * text[:, 1:].float().norm(dim=-1).mean() if text.shape[1] > 1 else factor * start.norm()
    shrink = 1 - float(start.norm() / length)
    for name, layer in model.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            along = layer.weight.float() @ direction
            layer.weight.sub_((shrink * torch.outer(along, direction)).to(layer.weight))
    enlarged = text.clone()
    enlarged[:, 0] = (length * direction).to(text)
    return enlarged


def _norms(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """The name of each norm with a weight and a bias, the norm, and the layers that read it."""
    for block_name, block in model.named_modules():
        for norm_name, reader_names in _READERS:
            norm = getattr(block, norm_name, None)
            readers = [reader for name in reader_names if (reader := _find(block, name)) is not None]
            if isinstance(norm, kinds) and norm.weight is not None and len(readers) == len(reader_names):
                yield f"{block_name}.{norm_name}".lstrip("."), norm, readers


def _find(module: nn.Module, name: str) -> nn.Module | None:
    """The descendant of this name, if there is one."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
