"""Windows' rules for files, on Linux: what this process has open, nobody can rename, replace or delete."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onlinequant_backend import operating_system


def pretend_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``operating_system`` say that this is Windows, and ``os`` behave as it does there, as far as that matters
    for files: no users, no modes, folders that cannot be opened, and open files that stay where they are."""
    monkeypatch.setattr(operating_system, "is_windows", lambda: True)
    for name in ("geteuid", "nice"):
        monkeypatch.delattr(os, name)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, _unless_open(getattr(os, name), 2))
    for name in ("unlink", "remove", "rmdir"):
        monkeypatch.setattr(os, name, _unless_open(getattr(os, name), 1))
    monkeypatch.setattr(os, "open", _no_folders(os.open))
    monkeypatch.setattr(shutil, "_use_fd_functions", False)


def open_files() -> set[str]:
    """The paths of the files that this process has open."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(descriptor))  # noqa: PTH115, which would ask whether a pipe exists
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def _unless_open(function: Callable[..., Any], paths: int) -> Callable[..., Any]:
    @functools.wraps(function)
    def careful(*args: Any, **kwargs: Any) -> Any:
        for path in args[:paths]:
            whole = str(Path(path).parent.resolve() / Path(path).name)
            if any(file == whole or file.startswith(f"{whole}/") for file in open_files()):
                raise PermissionError(13, "The process cannot access the file because it is being used", str(path))
        return function(*args, **kwargs)

    return careful


def _no_folders(function: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(function)
    def only_files(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *args, **kwargs)

    return only_files
