"""What differs between operating systems, so that no other module asks which one it runs on, and tests can pretend
another one. See ``fork_locks`` for what only systems with ``fork`` need."""

from __future__ import annotations

import os
import platform
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

_Result = TypeVar("_Result")

# Seconds to wait for a file that somebody has open: virus scanners and readers close it within milliseconds.
_PATIENCE, _PAUSE = 1.0, 0.02
_JUNCTION = 0xA0000003  # ``stat.IO_REPARSE_TAG_MOUNT_POINT``, which only Windows' Python has
_LONGEST_PATH = 259  # characters on Windows, unless long paths are enabled
_CGROUP = Path("/sys/fs/cgroup")  # control groups, version 2
_LONG_PATHS = r"SYSTEM\CurrentControlSet\Control\FileSystem"


def is_linux() -> bool:
    """Whether this is Linux."""
    return sys.platform == "linux"


def is_windows() -> bool:
    """Whether this is Windows."""
    return sys.platform == "win32"


def is_mac() -> bool:
    """Whether this is macOS."""
    return sys.platform == "darwin"


def processor() -> str:
    """The processor's architecture by the name that Linux has for it: "x86_64" or "aarch64", say."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def patiently(function: Callable[..., _Result], *args: Any) -> _Result:
    """``function(*args)``, which opens or renames. Windows refuses to rename what somebody has open, a file or anything
    in a folder, so there it is tried again for a second."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return function(*args)
        except PermissionError:
            if not is_windows() or time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE)


def is_link(info: os.stat_result) -> bool:
    """Whether ``info``, from ``lstat``, is of a link; Windows has links of another kind for folders, junctions."""
    return stat.S_ISLNK(info.st_mode) or getattr(info, "st_reparse_tag", 0) == _JUNCTION


def user_id() -> int | None:
    """The number of the user; None where files have no owner's number and no mode to be compared with it."""
    return None if is_windows() else os.geteuid()


def is_own_group(group: int) -> bool:
    """Whether a group is the one of this user's name, which has no other members: with it come a umask of 002, and so
    folders that the group may write to."""
    import grp
    import pwd

    try:
        name, members = grp.getgrgid(group).gr_name, grp.getgrgid(group).gr_mem
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return group != 0 and name == user and set(members) <= {user}


def quoted(argument: str) -> str:
    """An argument as it is typed into the system's shell."""
    return subprocess.list2cmdline([argument]) if is_windows() else shlex.quote(argument)


def background_process() -> dict[str, Any]:
    """Arguments of ``subprocess.Popen`` for a process that does not get in the user's way: on Windows it has a lower
    priority and opens no window. Elsewhere it calls ``be_nice``."""
    flags = ("CREATE_NO_WINDOW", "BELOW_NORMAL_PRIORITY_CLASS")
    return {"creationflags": sum(getattr(subprocess, flag) for flag in flags)} if is_windows() else {}


def be_nice() -> None:
    """Give this process a lower priority; it still gets a quarter of busy processors."""
    if hasattr(os, "nice"):
        os.nice(5)


def missing_characters(folder: Path, needed: int) -> int:
    """By how many characters paths are too long that have ``needed`` more than ``folder``; 0 where they can be longer
    than 260."""
    return 0 if not is_windows() or _has_long_paths() else max(0, len(str(folder)) + needed - _LONGEST_PATH)


def _has_long_paths() -> bool:
    try:
        import winreg

        registry: Any = winreg
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, _LONG_PATHS) as key:
            return bool(registry.QueryValueEx(key, "LongPathsEnabled")[0])
    except (ImportError, OSError):
        return False


def free_memory() -> tuple[int, int]:
    """The bytes of host memory that are free, and of all memory; a container's if it has a limit of its own."""
    whole = psutil.virtual_memory()
    limit, used = (_number_in(name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None or limit >= whole.total:
        return whole.available, whole.total
    # What files have left in memory is given up when it is needed.
    stated = dict(line.split() for line in _read(_CGROUP / "memory.stat").splitlines())
    return max(0, min(whole.available, limit - used + int(stated.get("inactive_file", 0)))), limit


def _number_in(name: str) -> int | None:
    text = _read(_CGROUP / name).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:  # no control groups here, or not of version 2
        return ""
