"""Which families of kernels are off, and why, on GPUs and with Tritons that are pretended."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from onlinequant_backend.kernels.nvidia import families

HOPPER = (9, 0)
GLUON = "triton.experimental.gluon"
NAMES = f"{families.__package__}.gluon_names"
Install = Callable[..., None]


def module(name: str, **values: object) -> ModuleType:
    made = ModuleType(name)
    made.__path__ = []  # a package, so that what is not in ``sys.modules`` is not found
    vars(made).update(values)
    return made


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install("3.9.0", tma=["async_load"])``: a Triton of this version, with these functions for copies; ``lacks``
    names other modules and functions that it has not."""

    def forget() -> None:
        families.missing_descriptors.cache_clear()
        families.missing_gluon.cache_clear()

    def set_triton(version: str | None, tma: tuple[str, ...] = (), lacks: tuple[str, ...] = ()) -> None:
        for name in [name for name in sys.modules if name == "triton" or name.startswith("triton.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delitem(sys.modules, NAMES, raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: version and ModuleSpec(name, None))
        forget()
        if version is None:
            return
        hopper = {
            "mbarrier": "mbarrier",
            "fence_async_shared": "fence",
            "tma": module("tma", **dict.fromkeys(tma, len)),
        }
        hopper |= dict.fromkeys(("warpgroup_mma", "warpgroup_mma_wait"), "product")
        modules = {
            "triton": {"__version__": version},
            "triton.tools": {},
            "triton.tools.tensor_descriptor": {},
            "triton.experimental": {},
            GLUON: {},
            f"{GLUON}.language": {},
            f"{GLUON}.language.nvidia": {},
            f"{GLUON}.language.nvidia.hopper": hopper,
            f"{GLUON}.nvidia": {},
            f"{GLUON}.nvidia.hopper": {"TensorDescriptor": "boxes"},
        }
        for name, values in modules.items():
            if not any(name == other or name.startswith(f"{other}.") for other in lacks):
                there = {key: value for key, value in values.items() if key not in lacks}
                monkeypatch.setitem(sys.modules, name, module(name, **there))

    yield set_triton
    monkeypatch.undo()
    sys.modules.pop(NAMES, None)
    forget()


OLD = ("async_copy_global_to_shared", "async_copy_shared_to_global", "store_wait")
NEW = ("async_load", "async_store", "store_wait")


@pytest.mark.parametrize(
    ("version", "tma"),
    [("3.6.0", OLD), ("3.7.1", OLD), ("3.8.0", (*OLD, *NEW)), ("3.9.0", NEW), ("3.10.0+git1234", NEW), ("4.0.0", NEW)],
)
def test_gluon_is_on_by_whichever_names_there_are(version: str, tma: tuple[str, ...], install: Install) -> None:
    install(version, tma)
    assert families.without_gluon(HOPPER) is None
    assert set(families.families(HOPPER).values()) == {None}


def test_the_newer_name_is_taken(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 keeps the older ones, which raise an error when they are compiled."""
    install("3.9.0", (*OLD, *NEW))
    tma = sys.modules[f"{GLUON}.language.nvidia.hopper"].tma
    for name in OLD[:2]:
        monkeypatch.setattr(tma, name, "gone")
    names = importlib.import_module(NAMES)
    assert (names.async_load, names.async_store) == (tma.async_load, tma.async_store)


@pytest.mark.parametrize(
    ("version", "tma", "lacks", "reason"),
    [
        ("3.5.1", OLD, (), "needs Triton 3.6, and this is 3.5.1"),
        ("3.10.0", ("async_store", "store_wait"), (), "Triton 3.10.0 has another Gluon: there is no tma.async_load"),
        ("3.10.0", ("async_load", "store_wait"), (), "Triton 3.10.0 has another Gluon: there is no tma.async_store"),
        ("3.10.0", NEW, ("warpgroup_mma",), "Triton 3.10.0 has another Gluon: cannot import name 'warpgroup_mma'"),
        ("3.10.0", NEW, (f"{GLUON}.nvidia.hopper",), "Triton 3.10.0 has another Gluon: No module named"),
        ("3.10.0", NEW, (GLUON,), "Triton 3.10.0 has another Gluon: No module named 'triton.experimental.gluon'"),
    ],
)
def test_only_gluon_is_off_without_what_it_needs(
    version: str, tma: tuple[str, ...], lacks: tuple[str, ...], reason: str, install: Install
) -> None:
    install(version, tma, lacks)
    found = families.families(HOPPER)
    assert str(found.pop("Gluon convolutions")).startswith(reason)
    assert set(found.values()) == {None}


def test_without_descriptors_nothing_uses_the_tma(install: Install) -> None:
    install("3.2.0", lacks=("triton.tools.tensor_descriptor",))
    found = families.families(HOPPER)
    reason = "Triton 3.2.0 has no tensor descriptors: No module named 'triton.tools.tensor_descriptor'"
    uses_tma = ("TMA matmul", "TMA matmul with GEGLU", "TMA convolutions", "Gluon convolutions", "TMA attention")
    assert {name: why for name, why in found.items() if why} == dict.fromkeys(uses_tma, reason)


def test_without_triton_all_are_off(install: Install) -> None:
    install(None)
    assert set(families.families(HOPPER).values()) == {"Triton is not installed"}


def test_a_triton_that_cannot_be_imported_is_none(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("3.9.0", NEW)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    (reason,) = set(families.families(HOPPER).values())
    assert str(reason).startswith("Triton cannot be imported: ")


@pytest.mark.parametrize(
    ("capability", "on", "gluon"),
    [
        ((7, 5), 0, "needs compute capability 9.0"),
        ((8, 0), 7, "needs compute capability 9.0"),
        ((8, 9), 7, "needs compute capability 9.0"),
        ((9, 0), 13, None),
        ((10, 0), 12, "its instructions exist only on compute capability 9.0"),
        ((12, 0), 12, "its instructions exist only on compute capability 9.0"),
    ],
)
def test_gpus_differ(capability: tuple[int, int], on: int, gluon: str | None, install: Install) -> None:
    install("3.9.0", NEW)
    found = families.families(capability)
    assert list(found.values()).count(None) == on
    assert found["Gluon convolutions"] == gluon
    assert found["GroupNorm"] == (None if capability >= (8, 0) else "needs compute capability 8.0")
