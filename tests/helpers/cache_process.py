"""A process of its own that uses the cache as a model would: ``start("hold", ROOT)`` and so on.

It starts quickly, since the cache imports no torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_CHECKOUT = Path(__file__).parents[2]


def start(command: str, root: Path, *arguments: object) -> subprocess.Popen[str]:
    """Run one of the commands below on the cache in ``root``; what it prints and reads are pipes."""
    line = [sys.executable, __file__, command, str(root), *map(str, arguments)]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def output(command: str, root: Path, *arguments: object) -> list[str]:
    """Run a command to its end; the lines that it prints."""
    process = start(command, root, *arguments)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, command
    return printed.splitlines()


def _publish_with_steps(root: Path, at_step: Callable[[str], None]) -> None:
    """Publish another calibration under the lock, and import it, with ``at_step`` at each point of these."""
    from onlinequant_backend.cache import atomic_files
    from onlinequant_backend.cache.cache_store import Cache
    from onlinequant_backend.cache.eviction import IMPORTED
    from tests.helpers.calibrations import KEY, STATS, calibration

    atomic_files._step = at_step
    cache = Cache.open(str(root))
    with cache.lock(KEY, 0):
        cache.publish(KEY, calibration(calls=21), STATS)
    imported = {"calibration.safetensors": calibration(calls=22).to_bytes(KEY)}
    atomic_files.publish_folder(root, IMPORTED, KEY[:32], imported)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def name_steps(root: Path) -> None:
    """Print the name of each step."""
    _publish_with_steps(root, _say)


def die_at_step(root: Path, number: str) -> None:
    """Kill this process at that step."""
    left = int(number)

    def die(_: str) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    _publish_with_steps(root, die)


def hold(root: Path) -> None:
    """Hold the lock until standard input ends."""
    from onlinequant_backend.cache.cache_store import Cache
    from tests.helpers.calibrations import KEY

    with Cache.open(str(root)).lock(KEY, 0):
        _say("held")
        sys.stdin.read()


def try_lock(root: Path) -> None:
    """Print whether the lock is free."""
    from onlinequant_backend.cache.cache_store import Cache
    from tests.helpers.calibrations import KEY

    _say("locked" if Cache.open(str(root)).lock(KEY, 0) is None else "free")


def publish_and_load(root: Path, times: str) -> None:
    """Publish, each time another calibration, and load; print how often each outcome came."""
    import collections

    from onlinequant_backend import best_effort
    from onlinequant_backend.cache.cache_store import Cache
    from tests.helpers.calibrations import KEY, STATS, calibration

    cache = Cache.open(str(root))
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(int(times)):
        outcomes["published" if cache.publish(KEY, calibration(calls=os.getpid()), STATS) else "not published"] += 1
        outcomes["miss" if cache.load(KEY) is None else "hit"] += 1
    for outcome in (*outcomes, *best_effort._said):
        _say(outcome)


_COMMANDS = {command.__name__: command for command in (name_steps, die_at_step, hold, try_lock, publish_and_load)}

if __name__ == "__main__":
    sys.path.insert(0, str(_CHECKOUT))
    _COMMANDS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
