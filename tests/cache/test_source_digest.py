"""Which source files a cached result depends on: each module of the package is in one of two lists."""

from __future__ import annotations

from pathlib import Path

import pytest

import onlinequant_backend
from onlinequant_backend.cache import source_digest

PACKAGE = Path(onlinequant_backend.__file__).parent
# Modules that cannot change what is observed, selected or compiled.
NOT_COUNTED = {
    "__init__",
    "best_effort",
    "cache.__init__",
    "cache.cache_store",
    "cache.eviction",
    "cache.atomic_files",
    "cache.listing",
    "cache.locks",
    "cache.source_digest",
    "cache.weights_file",
    "cache.weights_store",
    "cli",
    "console",
    "errors",
    "float_backend",
    "fork_locks",
    "garbage_collection",
    "operating_system",
    "progress",
    "tested_torch",
    "report",
    "scenes",
}


def modules() -> dict[str, Path]:
    """Every source file of the package, ``passes`` included, by the name of its module."""
    files = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
    passes = PACKAGE.parent / "passes"
    files |= {path.relative_to(passes.parent): path for path in passes.rglob("*.py")}
    return {".".join(file.with_suffix("").parts): path for file, path in files.items()}


def below(module: str, names: set[str]) -> list[str]:
    return [name for name in names if module == name or module.startswith(f"{name}.")]


@pytest.mark.parametrize("module", sorted(modules()))
def test_each_module_is_in_one_list(module: str) -> None:
    lists = below(module, {*source_digest.COUNTED}), below(module, NOT_COUNTED)
    assert sorted(map(len, lists)) == [0, 1], (
        f"Add {module} to source_digest.COUNTED if it can change what is observed, selected or compiled, else to "
        "NOT_COUNTED here."
    )


def test_no_list_names_a_module_that_is_gone() -> None:
    for name in (*source_digest.COUNTED, *NOT_COUNTED):
        assert any(below(module, {name}) for module in modules()), name


def test_the_counted_files_are_those_of_the_list() -> None:
    counted = {path for module, path in modules().items() if below(module, {*source_digest.COUNTED})}
    assert {*source_digest.sources().values()} == counted
    assert source_digest.sources()["kernels/nvidia/conv.py"] == PACKAGE / "kernels" / "nvidia" / "conv.py"
    assert source_digest.sources()["ops/ops.py"] == PACKAGE / "ops.py"


def test_a_module_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_digest, "COUNTED", ("ops", "absent"))
    with pytest.raises(ModuleNotFoundError, match="lacks its module absent"):
        source_digest.sources()


def test_names_and_contents_count(tmp_path: Path) -> None:
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    digests = []
    for texts in (("", ""), ("# changed\n", ""), ("", "# changed\n")):
        for path, text in zip((first, second), texts, strict=True):
            path.write_text(text)
        digests += [source_digest.digest({"a": first, "b": second}), source_digest.digest({"a": first, "c": second})]
    assert len({*digests}) == len(digests)
    second.write_text("# changed\n")
    assert source_digest.digest({"b": second, "a": first}) == digests[-2]
