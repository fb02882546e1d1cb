"""Work in another thread, under the conditions of the thread that asks for it."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import torch


class Background:
    """At most one piece of work at a time.

    The thread ends with the process, whatever it is doing: nobody waits for a compile whose result is not wanted any
    more. What it had begun to write is not there for others then (``files``).
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def is_busy(self) -> bool:
        """Whether there is work that is not done yet."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], object], device: torch.device) -> None:
        """Have ``work`` done, which must not raise: in this thread's grad and inference mode, and with its listener."""
        context = contextvars.copy_context()
        is_inference, has_grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def run() -> None:
            with torch.inference_mode(is_inference), torch.set_grad_enabled(has_grad):
                if device.type != "cuda":
                    context.run(work)
                    return
                with torch.cuda.device(device):
                    context.run(work)
                    # Whoever uses the result may do so on another stream.
                    torch.cuda.synchronize()

        self._thread = threading.Thread(target=run, name="onlinequant-background", daemon=True)
        self._thread.start()
