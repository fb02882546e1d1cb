"""The ways of running a denoiser that ``fidelity.py`` compares."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

import onlinequant_backend as oq
from benchmarks.per_token import per_token
from onlinequant_backend.torch_internals import inductor_interface

Denoiser = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
        name: what it is called.
        kind: a key of ``_KINDS``.
        precision: "int8" or "fp8"; "float" where nothing is quantized.
        options: of ``onlinequant``, beside ``precision``.
        is_shown: whether its pictures are on the sheet.
    """

    name: str
    kind: str
    precision: str = "float"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_shown: bool = False

    @contextlib.contextmanager
    def denoiser(self, model: nn.Module) -> Iterator[Denoiser]:
        """``model``, run this way; nothing of it is left behind."""
        oq.reset()
        torch._dynamo.reset()
        with _KINDS[self.kind](self, model) as denoiser:
            yield denoiser


EAGER = Variant("eager", "eager", is_shown=True)
COMPILED = Variant("torch.compile", "compiled")


def variants(precisions: Sequence[str], methods: Sequence[str], options: Mapping[str, Any]) -> list[Variant]:
    """The reference, the noise floor, and each precision with each calibration method and per token.

    ``options`` of onlinequant hold for all of them. The last method's pictures are shown. A floating format is never
    clipped, so for fp8 all methods are one.
    """
    found = [EAGER, COMPILED]
    for precision in precisions:
        for method in methods[-1:] if precision == "fp8" else methods:
            name = precision if precision == "fp8" else f"{precision}, {method}"
            chosen = {**options, "calibration_method": method}
            found.append(Variant(name, "ours", precision, chosen, is_shown=method == methods[-1]))
        found.append(Variant(f"{precision} per token, linears", "per token", precision))
    return found


def without_inductor() -> contextlib.AbstractContextManager[Any]:
    """Within the block onlinequant's rewritten graphs run op by op: the same arithmetic, and nothing to compile."""
    return mock.patch.object(inductor_interface, "compile_fx", lambda graph_module, *args, **options: graph_module)


@contextlib.contextmanager
def _eager(_variant: Variant, model: nn.Module) -> Iterator[Denoiser]:
    yield model


@contextlib.contextmanager
def _compiled(_variant: Variant, model: nn.Module) -> Iterator[Denoiser]:
    yield torch.compile(model)


@contextlib.contextmanager
def _ours(variant: Variant, model: nn.Module) -> Iterator[Denoiser]:
    # A cache of its own: what another variant has observed must not be found there.
    with tempfile.TemporaryDirectory() as cache:
        options = {**variant.options, "precision": variant.precision, "cache_dir": cache}
        yield torch.compile(model, backend=oq.onlinequant, options=options)


@contextlib.contextmanager
def _per_token(variant: Variant, model: nn.Module) -> Iterator[Denoiser]:
    yield per_token(model, variant.precision)


_KINDS = {"eager": _eager, "compiled": _compiled, "ours": _ours, "per token": _per_token}
