"""A real ComfyUI in a process of its own, and what happens in it while it runs a prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.comfyui_events import DONE, measured, trouble

ROOT = Path(__file__).parent.parent
PROBE = "/onlinequant_benchmark"
START_SECONDS = 120


class Clock:
    """What is left of a number of seconds."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


class OutOfTimeError(Exception):
    """The clock says that this cannot be done any more."""


class ServerError(Exception):
    """ComfyUI did not start, or ended, or refused a prompt."""


class GpuMemory:
    """The most memory of the whole GPU that was in use since ``reset``, in MiB, looked at ten times a second.

    All processes count, since what a user can do next to ComfyUI depends on that. Without NVML ``nvidia-smi`` is asked,
    less often; without that, it is 0.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._used = _used_memory()
        if self._used is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        self.peak = 0 if self._used is None else self._used()

    def _watch(self) -> None:
        assert self._used is not None
        while True:
            with contextlib.suppress(Exception):
                self.peak = max(self.peak, self._used())
            time.sleep(0.1)


def _used_memory() -> Callable[[], int] | None:
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(index))
        return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) >> 20
    except Exception:  # not installed, or no driver
        pass

    def asked() -> int:
        query = ["nvidia-smi", f"--id={index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)

    try:
        asked()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return asked


@dataclasses.dataclass(frozen=True)
class Installation:
    """How servers are started.

    Attributes:
        comfyui: the checkout.
        base: its base directory, with `custom_nodes`, `models` and so on.
        python: what runs it.
        launcher: a script that is started instead of `main.py`, with the checkout as its first argument.
        flags: more arguments of ComfyUI's.
        logs: folder of the servers' logs.
    """

    comfyui: Path
    base: Path
    python: Path
    launcher: Path | None
    flags: Sequence[str]
    logs: Path

    def lay_out(self) -> None:
        """Make the folders that ComfyUI has in its base directory, with this checkout and the probe as custom nodes."""
        for folder in ("custom_nodes", "input", "output", "user", "models", "front"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        (self.base / "front" / "index.html").write_text("no page here")
        shutil.copy(self.comfyui / "input" / "example.png", self.base / "input")
        for name, target in (("onlinequant", ROOT), ("onlinequant_probe", ROOT / "benchmarks" / "comfyui_probe")):
            link = self.base / "custom_nodes" / name
            if link.is_symlink():
                link.unlink()
            elif link.exists():
                shutil.rmtree(link)
            link.symlink_to(target)


class Server:
    """A running ComfyUI; a context manager that stops it.

    ``caches``: where this process and those that are started with the same folder keep what they compile.
    """

    def __init__(self, installation: Installation, name: str, caches: Path, clock: Clock, memory: GpuMemory) -> None:
        self.name = name
        self._base = installation.base
        self._clock = clock
        self._memory = memory
        self._stopped = False
        self._log = installation.logs / f"server-{name}.log"
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        front = installation.base / "front"  # a page is not needed
        start = [installation.comfyui / "main.py"]
        if installation.launcher is not None:
            start = [installation.launcher, installation.comfyui]
        command = [installation.python, *start, "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--base-directory", installation.base, "--disable-auto-launch", "--front-end-root", front]
        command += ["--database-url", "sqlite:///:memory:", *installation.flags]
        began = time.monotonic()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(caches),
                cwd=installation.comfyui,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - began

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, as Ctrl-C does."""
        self._stopped = self._process.poll() is None
        if self._stopped:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with the processes that compile for it
        self._process.wait()

    def trouble(self) -> dict[str, Any]:
        """What its log says after the end: tracebacks, warnings of this backend, and whether it died by itself."""
        return {**trouble(self.log()), "died": not self._stopped}

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def prompt(self, graph: Mapping[str, Any]) -> dict[str, Any]:
        """Run a workflow in API format; what has happened, see ``measured``.

        Raises:
            OutOfTimeError: the clock has run out before it was done.
            ServerError: ComfyUI refused it, or ended.
        """
        before = self.probe(reset=True)
        logged = len(self.log())
        self._memory.reset()
        reply = self._post("/prompt", {"prompt": graph, "client_id": "benchmark"})
        name = reply["prompt_id"]
        while not (history := self.get(f"/history/{name}")):
            self._check()
            time.sleep(0.1)
        after = self.probe()
        entry = history[name]
        result = measured(graph, after["events"], entry["status"])
        result |= _differences(before, after)
        result["recompiles"] = self.log()[logged:].count("Recompiling function")
        result["peak_mib"] = self._memory.peak
        result["torch_peak_mib"] = after.get("torch_peak_mib")
        result["graphs"] = after["graphs"]
        result["files"] = self._files(entry["outputs"])
        if result["status"] != "success":
            result["messages"] = json.dumps(entry["status"])[-3000:]
        return result

    def settle(self, most: float) -> dict[str, Any]:
        """Wait until no graph is observed or compiled any more; "waited" seconds, None where it takes longer."""
        state = before = self.probe()
        start = time.monotonic()
        waited: float | None = 0.0
        while any(graph["phase"] not in DONE for graph in state["graphs"]):
            self._check()
            waited = time.monotonic() - start
            if waited > most:
                waited = None
                break
            time.sleep(0.25)
            state = self.probe()
        return {"waited": waited, **_differences(before, state)}

    def free(self) -> None:
        """Have ComfyUI unload its models and forget what it has computed, as the button does."""
        self._post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(3)  # the thread that runs prompts does so within a second

    def write_models(self, models: Sequence[Mapping[str, Any]], tiny: bool) -> list[str]:
        """Have the models written that are missing; a sentence about each."""
        written: list[str] = self._post(f"{PROBE}/models", {"models": list(models), "tiny": tiny})
        return written

    def probe(self, reset: bool = False) -> dict[str, Any]:
        """What ``comfyui_probe`` answers."""
        return dict(self.get(f"{PROBE}?reset=1" if reset else PROBE))

    def get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(self._url + path, timeout=60) as reply:
                return json.load(reply)
        except (OSError, TimeoutError) as error:
            if self._process.poll() is None:
                raise
            raise ServerError(self._last_words()) from error

    def _post(self, path: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            raise ServerError(f"ComfyUI refused {path}: {error.read().decode()[:2000]}") from error
        return json.loads(text) if text else None

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._check()
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self.get("/system_stats")
                self.get(PROBE)
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI does not answer after {START_SECONDS} s:\n{self.log()[-3000:]}")

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise ServerError(self._last_words())
        if self._clock.left() < 0:
            raise OutOfTimeError

    def _last_words(self) -> str:
        return f"ComfyUI ended with {self._process.returncode}:\n{self.log()[-3000:]}"

    def _files(self, outputs: Mapping[str, Any]) -> list[str]:
        """The pictures and latent images that were saved."""
        saved = [file for output in outputs.values() for kind in ("images", "latents") for file in output.get(kind, ())]
        folder = self._base / "output"
        return [str(folder / file["subfolder"] / file["filename"]) for file in saved if file["type"] == "output"]


def _environment(caches: Path) -> dict[str, str]:
    """The user's, with caches of one's own, and Dynamo saying when it traces anew."""
    unwanted = ("TRITON_CACHE_DIR", "COMFYUI_ONEDIFF_SAVE_GRAPH_DIR", "PYTHONDONTWRITEBYTECODE")
    variables = {name: value for name, value in os.environ.items() if name not in unwanted}
    return variables | {
        "ONLINEQUANT_CACHE_DIR": str(caches / "onlinequant"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_HOME": str(caches),  # Inductor and this backend may put Triton's cache elsewhere, as for users
        "TORCH_LOGS": "recompiles",
        "PYTHONUNBUFFERED": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """What was traced and compiled in between."""
    counted = {name: after[name] - before[name] for name in ("traces", "compiles", "trace_seconds")}
    ours = [sum(graph["compile_seconds"] for graph in state["graphs"]) for state in (before, after)]
    return {**counted, "compile_seconds": max(ours[1] - ours[0], 0.0)}  # graphs may have gone
