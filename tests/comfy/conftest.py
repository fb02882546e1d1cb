"""A real ComfyUI server with this checkout among its custom nodes, for the tests marked ``comfy``.

They run only when asked for (``pytest -m comfy``), for they install ComfyUI once: into the folder that the environment
variable ``ONLINEQUANT_COMFYUI`` names, or else one for temporary files. What installs and starts it lies beside the
checkout, in ``../shared/comfyui``; a copy is kept with the installation.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TOOLS = ROOT.parent / "shared" / "comfyui"
VARIABLE = "ONLINEQUANT_COMFYUI"
START_SECONDS, PROMPT_SECONDS = 180, 500


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "comfy" in config.option.markexpr:
        return
    deselected = [item for item in items if item.get_closest_marker("comfy")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


class Server:
    """A running ComfyUI.

    Attributes:
        base: its base directory.
        log: the file that holds what it prints.
    """

    def __init__(self, installation: Path, base: Path) -> None:
        self.base = base
        self.log = base / "log.txt"
        self._url = f"http://127.0.0.1:{_free_port()}"
        command = [
            *(installation / "venv/bin/python", installation / "tools/run_comfy.py", installation / "ComfyUI"),
            *("--cpu", "--listen", "127.0.0.1", "--port", self._url.rpartition(":")[2], "--base-directory", base),
            *("--disable-auto-launch", "--database-url", "sqlite:///:memory:"),
            "--use-pytorch-cross-attention",  # the other one asks for free memory, where Dynamo breaks the graph
        ]
        unwanted = ("ONLINEQUANT_CACHE_DIR", "COMFYUI_ONEDIFF_SAVE_GRAPH_DIR", "TRITON_INTERPRET", "PYTHONPATH")
        environment = {name: value for name, value in os.environ.items() if name not in unwanted}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self._get("/system_stats")
                return
            time.sleep(0.5)
        pytest.fail(f"ComfyUI does not start:\n{self.log.read_text()[-5000:]}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def draw(self, workflow: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Run a workflow in API format that succeeds and saves one picture; its values are in [0, 255]."""
        body = json.dumps({"prompt": workflow}).encode()
        request = urllib.request.Request(f"{self._url}/prompt", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            prompt = json.load(reply)["prompt_id"]
        deadline = time.monotonic() + PROMPT_SECONDS
        while not (history := self._get(f"/history/{prompt}")):
            assert time.monotonic() < deadline and self._process.poll() is None, self.log.read_text()[-5000:]
            time.sleep(0.2)
        status, outputs = history[prompt]["status"], history[prompt]["outputs"]
        assert status["status_str"] == "success", json.dumps(status, indent=1)[-5000:]
        ((image,),) = (output["images"] for output in outputs.values())
        return np.asarray(Image.open(self.base / "output" / image["filename"]), dtype=np.float64)

    def lines(self, containing: str) -> list[str]:
        """The lines of the log so far that contain a text."""
        return [line for line in self.log.read_text().splitlines() if containing in line]

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path) as reply:
            return json.load(reply)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    installation = _installation()
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir()
    (base / "models").symlink_to(installation / "models")
    (base / "custom_nodes" / "onlinequant").symlink_to(ROOT)
    running = Server(installation, base)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


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
