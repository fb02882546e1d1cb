"""What other operating systems lack or do otherwise is in one module, ``operating_system``; and what Windows cannot
check out is not in the repository."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for top in ("onlinequant_backend", "passes", "comfy_integration", "examples")
    for path in (ROOT / top).rglob("*.py")
)
# The modules that may ask for what follows.
GUARDS = {"onlinequant_backend/operating_system.py", "onlinequant_backend/fork_locks.py"}
# Not on Windows; where tests pretend Windows, these would still be there.
POSIX_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
WINDOWS_MODULES = {"msvcrt", "winreg", "_winapi"}
OF_ONE_SYSTEM = {
    *("os.name", "sys.platform", "sys.getwindowsversion", "platform.system", "platform.machine", "os.uname"),
    *("os.fork", "os.register_at_fork", "os.getuid", "os.geteuid", "os.getgid", "os.getpgid", "os.killpg", "os.nice"),
    *("os.sched_getaffinity", "os.mkfifo", "os.chown", "os.symlink", "signal.SIGKILL", "signal.alarm", "shlex.quote"),
    *("os.EX_OK", "os.statvfs", "os.getloadavg"),
}
# They replace or remove what may be open, which ``patiently`` does.
RENAMES = {"rename", "replace", "renames"}
READ_OR_WRITE_TEXT = {"open", "read_text", "write_text"}

# https://learn.microsoft.com/en-us/windows/win32/fileio/naming-a-file
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
FORBIDDEN = set('<>:"|?*\\') | {chr(code) for code in range(32)}
# Of 260 characters: the rest is for C:\Users\<name>\Documents\ComfyUI\custom_nodes\onlinequant\ and the like.
LONGEST = 140


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def of_one_system(path: Path) -> Iterator[str]:
    """What a source uses that only some systems have or that asks which one this is."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ({alias.name for alias in node.names} & (POSIX_MODULES | WINDOWS_MODULES))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            yield from ({str(name) for name in names} & (POSIX_MODULES | WINDOWS_MODULES | OF_ONE_SYSTEM))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from ({f"{node.value.id}.{node.attr}"} & OF_ONE_SYSTEM)


def without_encoding(path: Path) -> Iterator[int]:
    """The lines that open a text file in the system's encoding."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            mode = next((arg.value for arg in node.args if isinstance(arg, ast.Constant)), "")
            is_text = name in READ_OR_WRITE_TEXT and not (name == "open" and "b" in str(mode))
            of_os = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in ("os", "Cache")
            of_cache = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "attr", "") == "Cache"
            if is_text and not of_os and not of_cache and not any(kw.arg == "encoding" for kw in node.keywords):
                yield node.lineno


def impatient(path: Path) -> Iterator[int]:
    """The lines that call ``Path.rename``, ``Path.replace`` or their likes of ``os`` directly."""
    for node in nodes(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RENAMES:
            is_of_text = len(node.args) == 2 or getattr(node.func.value, "id", "") == "dataclasses"
            if not is_of_text or getattr(node.func.value, "id", "") == "os":
                yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_runs_on_any_system(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() not in GUARDS:
        assert list(of_one_system(path)) == [], "ask onlinequant_backend.operating_system"
    assert list(without_encoding(path)) == [], "Windows' encoding is seldom UTF-8"
    if path.parent.name == "cache":
        assert list(impatient(path)) == [], "use operating_system.patiently: on Windows somebody may have it open"


@pytest.mark.parametrize(
    ("line", "finds"),
    [
        ("import fcntl", of_one_system),
        ("from os import fork", of_one_system),
        ("import os; os.geteuid()", of_one_system),
        ("def f():\n    import winreg", of_one_system),
        ("open('a', 'w')", without_encoding),
        ("path.open()", without_encoding),
        ("path.read_text()", without_encoding),
        ("path.rename(other)", impatient),
        ("os.replace(a, b)", impatient),
    ],
)
def test_the_search_finds(line: str, finds: Callable[[Path], Iterator[object]], tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(line, encoding="utf-8")
    assert len(list(finds(tmp_path / "source.py"))) == 1


def test_windows_can_check_out_every_file() -> None:
    listing = subprocess.run(["git", "ls-files", "-s", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("this is no git checkout")
    entries = [entry.partition("\t") for entry in listing.stdout.decode().split("\0") if entry]
    names = [name for _, _, name in entries]
    for name in names:
        for part in name.split("/"):
            assert part.partition(".")[0].lower() not in RESERVED and part[-1] not in " .", name
            assert not FORBIDDEN & set(part), name
        assert len(name) <= LONGEST, name
    assert len({name.lower() for name in names}) == len(names), "names that differ in case only"
    links = {name for kind, _, name in entries if kind.startswith("120000")}
    assert all(link.startswith(".mypy/") for link in links), "links need a privilege; those are for developers"
