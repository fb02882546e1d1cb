"""The server for the tests marked ``comfy``, which run only when asked for (``pytest -m comfy``)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.comfy.server import Server as Server
from tests.comfy.server import running_server


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "comfy" in config.option.markexpr:
        return
    deselected = [item for item in items if item.get_closest_marker("comfy")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("comfyui")) as running:
        yield running
