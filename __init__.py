"""ComfyUI loads a folder in ``custom_nodes`` by this file; everything else finds the code by itself.

It is not part of the wheel. Whoever else imports it (pytest does) gets no nodes and no change to ``sys.path``.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

if __package__ and importlib.util.find_spec("folder_paths") is not None:  # ComfyUI's own module
    # The last place on the path: an installed onlinequant is preferred, and `tests` and the like hide nobody else's.
    sys.path.append(str(Path(__file__).parent))

    WEB_DIRECTORY = "comfy_integration/web"  # help pages

    async def comfy_entrypoint() -> Any:
        """What ComfyUI asks for the nodes."""
        from onlinequant_backend.comfy_integration.nodes import OnlineQuantExtension

        return OnlineQuantExtension()
