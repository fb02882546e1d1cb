"""A real ComfyUI server with this checkout among its custom nodes, on small random models.

It is installed once: into the folder that the environment variable ``ONLINEQUANT_COMFYUI`` names, or else one for
temporary files. What installs and starts it lies beside the checkout, in ``../shared/comfyui``; a copy is kept with the
installation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.comfy import tiny_models
from tests.comfy.workflow import DIT, HINT, OTHER_DIT, SMALL_CONTROL_NET, SMALL_UNET

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TOOLS = ROOT.parent / "shared" / "comfyui"
COMPILER = Path(__file__).with_name("g++")
VARIABLE = "ONLINEQUANT_COMFYUI"
START_SECONDS, PROMPT_SECONDS = 300, 1200
Picture = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a prompt ended.

    Attributes:
        status: "success", "error" or "interrupted".
        pictures: what it saved, [H, W, 3] with values in [0, 255].
        texts: what its nodes show as text.
        messages: what it said meanwhile, errors among it.
    """

    status: str
    pictures: list[Picture]
    texts: list[str]
    messages: str


class Server:
    """A running ComfyUI.

    Attributes:
        base: its base directory.
        url: where it answers.
        log: the file that holds what it prints.
    """

    def __init__(self, installation: Path, base: Path, environment: Mapping[str, str] | None = None) -> None:
        self.base = base
        self.log = base / "log.txt"
        self.url = f"http://127.0.0.1:{_free_port()}"
        command = [
            *(installation / "venv/bin/python", installation / "tools/run_comfy.py", installation / "ComfyUI"),
            *("--cpu", "--listen", "127.0.0.1", "--port", self.url.rpartition(":")[2], "--base-directory", base),
            *("--disable-auto-launch", "--database-url", "sqlite:///:memory:"),
            "--use-pytorch-cross-attention",  # the other one asks for free memory, where Dynamo breaks the graph
        ]
        unwanted = ("ONLINEQUANT_CACHE_DIR", "COMFYUI_ONEDIFF_SAVE_GRAPH_DIR", "TRITON_INTERPRET", "PYTHONPATH")
        variables = {name: value for name, value in os.environ.items() if name not in unwanted}
        libraries = installation / "libraries"
        libraries.mkdir(exist_ok=True)
        variables |= {
            "CXX": str(COMPILER),
            "KEPT_LIBRARIES": str(libraries),
            "TORCH_LOGS": "recompiles",  # so that the log says when Dynamo traces anew, and why
        }
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**variables, **(environment or {})}
            )

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self.get("/system_stats")
                return
            time.sleep(0.5)
        pytest.fail(f"ComfyUI does not start:\n{self.log.read_text()[-5000:]}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def run(self, workflow: dict[str, Any]) -> Result:
        """Run a workflow in API format that succeeds."""
        result = self.result(self.submit(workflow))
        assert result.status == "success", result.messages[-5000:]
        return result

    def submit(self, workflow: dict[str, Any]) -> str:
        """Have a workflow run, and return the name of the prompt."""
        prompt: str = json.loads(self.post("/prompt", {"prompt": workflow}))["prompt_id"]
        return prompt

    def result(self, prompt: str) -> Result:
        """Wait for the end of a prompt."""
        deadline = time.monotonic() + PROMPT_SECONDS
        while not (history := self.get(f"/history/{prompt}")):
            self._still_running(deadline)
            time.sleep(0.05)
        status, outputs = history[prompt]["status"], history[prompt]["outputs"].values()
        was_interrupted = any(kind == "execution_interrupted" for kind, _ in status["messages"])
        images = [image for output in outputs for image in output.get("images", ()) if image["type"] == "output"]
        return Result(
            status="interrupted" if was_interrupted else status["status_str"],
            pictures=[np.asarray(Image.open(self.base / "output" / image["filename"]), float) for image in images],
            texts=[text for output in outputs for text in output.get("text", ())],
            messages=json.dumps(status["messages"], indent=1),
        )

    def lines(self, containing: str) -> list[str]:
        """The lines of the log so far that contain a text."""
        return [line for line in self.log.read_text().splitlines() if containing in line]

    def wait_for(self, pattern: str, since: int = 0) -> None:
        """Wait until a regular expression is found in the log, after so many characters of it."""
        deadline = time.monotonic() + PROMPT_SECONDS
        while not re.search(pattern, self.log.read_text()[since:]):
            self._still_running(deadline)
            time.sleep(0.02)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path) as reply:
            return json.load(reply)

    def post(self, path: str, body: Any) -> bytes:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            answer: bytes = reply.read()
        return answer

    def _still_running(self, deadline: float) -> None:
        assert time.monotonic() < deadline and self._process.poll() is None, self.log.read_text()[-5000:]


@contextlib.contextmanager
def running_server(base: Path, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A ComfyUI whose base directory is this empty one."""
    installation = _installation()
    for name in ("custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir()
    (base / "custom_nodes" / "onlinequant").symlink_to(ROOT)
    (base / "custom_nodes" / "block_patch.py").symlink_to(Path(__file__).with_name("block_patch.py"))
    _add_models(installation / "models", base / "models")
    gradient = np.linspace(0, 255, 128 * 128 * 3).reshape(128, 128, 3)
    Image.fromarray(gradient.astype(np.uint8)).save(base / "input" / HINT)
    running = Server(installation, base, environment)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def _add_models(installed: Path, models: Path) -> None:
    """Links to those that are installed, and those that are made of these."""
    for folder in ("checkpoints", "controlnet", "diffusion_models", "loras"):
        (models / folder).mkdir(parents=True)
    for file in installed.glob("*/*"):
        (models / file.relative_to(installed)).symlink_to(file)
    checkpoint = models / "checkpoints/tiny_sd15.safetensors"
    tiny_models.write_small_unet(checkpoint, models / "diffusion_models" / SMALL_UNET)
    tiny_models.write_small_control_net(
        models / "controlnet/tiny_sd15_cn.safetensors", models / "controlnet" / SMALL_CONTROL_NET
    )
    for seed, name in enumerate((DIT, OTHER_DIT)):
        tiny_models.write_dit(checkpoint, models / f"checkpoints/tiny_{name}.safetensors", seed)


def run_script(name: str) -> None:
    """Run a script of this folder in ComfyUI's environment, without a server; its argument is the installation."""
    installation = _installation()
    command = [installation / "venv/bin/python", Path(__file__).with_name(name), installation]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]


def _installation() -> Path:
    """The folder with ComfyUI, its environment, small random models and what starts it; made where it is missing."""
    if VARIABLE not in os.environ and not TOOLS.is_dir():
        pytest.skip(f"{VARIABLE} names no ComfyUI, and there is no {TOOLS} to install one with")
    folder = Path(os.environ.get(VARIABLE) or Path(tempfile.gettempdir()) / "onlinequant-comfyui").resolve()
    if not (folder / "complete").exists():
        assert TOOLS.is_dir(), f"{folder} holds no complete ComfyUI, and there is no {TOOLS} to install one with"
        _install(folder)
    return folder


def _install(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["bash", TOOLS / "install.sh", folder], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = [dependency for dependency in project["dependencies"] if not dependency.startswith("torch")]
    python = folder / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *ours], check=True)
    (folder / "tools").mkdir(exist_ok=True)
    for tool in TOOLS.iterdir():
        shutil.copyfile(tool, folder / "tools" / tool.name)
    subprocess.run([python, folder / "tools/make_tiny.py", folder / "ComfyUI", folder / "models"], check=True)
    (folder / "complete").touch()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
