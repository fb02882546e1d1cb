"""Writes the example workflows into this folder, ``*.json`` under the titles that ComfyUI lists them by.

``python example_workflows/make.py`` writes ``api/*.json``, which programs post to a server.
``python example_workflows/make.py http://127.0.0.1:8188`` also writes ``*.json``, which people open: in which order the
inputs of a node come, and which of them are widgets, is asked of that ComfyUI, where onlinequant must be installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from example_workflows.formats import api_format, ui_format
from example_workflows.thumbnail import thumbnail
from example_workflows.workflows import workflows

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the example workflows.")
    parser.add_argument("url", nargs="?", help="a running ComfyUI, for the UI format; without it, API format only")
    url = parser.parse_args().url
    schemas = None
    if url is not None:
        with urllib.request.urlopen(f"{url.rstrip('/')}/object_info") as reply:
            schemas = json.load(reply)
    for name, workflow in workflows().items():
        _write(HERE / "api" / f"{name}.json", api_format(workflow))
        if schemas is not None:
            graph = ui_format(workflow, schemas)
            _write(HERE / f"{workflow.title}.json", graph)
            thumbnail(workflow.title, graph).save(HERE / f"{workflow.title}.jpg", quality=85)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
