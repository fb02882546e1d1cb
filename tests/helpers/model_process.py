"""A process of its own that compiles a small model and then does what it is told.

Commands, answers and log records go through a pipe, so that a test can order what several processes do by what these
have said.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Importing torch takes seconds. Most processes are forked from one that has done so, and nothing else; others are new
# interpreters, whose hashes of strings differ.
_FORKING, _NEW = multiprocessing.get_context("forkserver"), multiprocessing.get_context("spawn")
_FORKING.set_forkserver_preload(["torch._inductor.compile_fx", "tests.runtime.test_quantized_graph"])


class ModelProcess:
    """Starts one, with a ``Session``."""

    def __init__(
        self,
        cache: Path,
        *,
        model: str = "net",
        seed: int = 0,
        inductor: bool = False,
        new_interpreter: bool = False,
        **options: Any,
    ) -> None:
        """``model``, "net" or "small", and the rest are for ``Session``."""
        self.logged: list[str] = []
        self.warnings: list[str] = []
        self._pipe, theirs = multiprocessing.Pipe()
        # CUDA cannot be used in a process that was forked from one that has asked for GPUs, as Inductor does.
        has_gpu = Path("/dev/nvidiactl").exists()
        context: Any = _NEW if new_interpreter or (inductor and has_gpu) else _FORKING
        given = (theirs, str(cache), model, seed, inductor, options)
        # Not as a daemon: those may have no children, and Inductor compiles in some.
        self._process = context.Process(target=_run, args=given)
        self._process.start()
        theirs.close()

    def __enter__(self) -> ModelProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def tell(self, command: str, *arguments: Any) -> None:
        """Have it run one of the methods of ``Session``, without waiting for that."""
        self._pipe.send((command, arguments))

    def answer(self) -> Any:
        """Wait until it has done the first thing that it was told, and return what that gave."""
        return next(value for kind, value in self._said() if kind == "answer")

    def ask(self, command: str, *arguments: Any) -> Any:
        """Have it do something, and wait for the answer."""
        self.tell(command, *arguments)
        return self.answer()

    def await_log(self, text: str) -> None:
        """Wait until it logs a message with ``text`` in it; there must be no answer before."""
        for kind, value in self._said():
            assert kind == "log", value
            if text in self.logged[-1]:
                return

    def kill(self) -> None:
        """End it at once, with SIGKILL, as the system does where memory is short."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _said(self) -> Iterator[tuple[str, Any]]:
        while True:
            try:
                kind, value = self._pipe.recv()
            except EOFError:
                raise AssertionError(f"the process has ended; it had logged {self.logged}") from None
            if kind == "log":
                level, message = value
                self.logged.append(message)
                if level >= logging.WARNING:
                    self.warnings.append(message)
            yield kind, value


class Session:
    """What runs in the process: each method is a command. ``inductor``: the real one, instead of a stand-in."""

    def __init__(self, model: str, seed: int, inductor: bool, options: dict[str, Any]) -> None:
        import torch

        import onlinequant_backend as oq
        from onlinequant_backend.quantization import weight_copy
        from onlinequant_backend.torch_internals import inductor_interface
        from tests.helpers.eager_inductor import EagerInductor
        from tests.helpers.small import small
        from tests.helpers.tiny import OPTIONS, net

        self._quantized: list[object] = []
        quantize = weight_copy.quantize_weight

        def noted(*given: Any, **more: Any) -> Any:
            self._quantized.append(given)
            return quantize(*given, **more)

        weight_copy.quantize_weight = noted
        torch.set_grad_enabled(False)
        torch._inductor.config.compile_threads = 1  # one kernel is compiled sooner than processes for more have begun
        if not inductor:
            inductor_interface.compile_fx = EagerInductor()
        self._model: Any = net(seed) if model == "net" else small(seed)
        self._compiled: Any = torch.compile(self._model, backend=oq.onlinequant, options={**OPTIONS, **options})

    def call(self, *shape: int) -> dict[str, Any]:
        """Call the model with noise; returns the picture, the newest report and Inductor's cache counters."""
        import torch

        import onlinequant_backend as oq
        from tests.helpers.tiny import noise

        picture = self._compiled(noise(*shape)).tolist()
        report, counters = oq.reports()[-1], torch._dynamo.utils.counters
        fields = ("phase", "calls_observed", "cache_hit", "key", "stats_path")
        caches = {name: count for kind in ("aot_autograd", "inductor") for name, count in counters[kind].items()}
        return {"picture": picture, **{name: getattr(report, name) for name in fields}, "caches": caches}

    def quantized_weights(self) -> int:
        """How many weights this process has quantized for its calls."""
        return len(self._quantized)

    def fuse(self) -> None:
        """Change some weights in place, as fusing a LoRA does."""
        from tests.helpers.tiny import deltas

        for layer, delta in deltas(self._model):
            layer.weight.add_(delta)

    def lose_directory(self) -> None:
        """Let a file take the place of Inductor's folder when Inductor begins to write."""
        from torch._inductor import codecache

        folder = Path(os.environ["ONLINEQUANT_CACHE_DIR"]) / "inductor"
        write = codecache.write_atomic

        def write_late(path: str, *arguments: Any, **options: Any) -> None:
            if folder.is_dir():
                shutil.rmtree(folder)
                folder.touch()
            write(path, *arguments, **options)

        codecache.write_atomic = write_late

    def drop(self) -> None:
        """Delete the model."""
        self._model = self._compiled = None
        gc.collect()


class _Handler(logging.Handler):
    def __init__(self, pipe: Connection, saying: threading.Lock) -> None:
        super().__init__()
        self._pipe, self._saying = pipe, saying

    def emit(self, record: logging.LogRecord) -> None:
        with self._saying:
            self._pipe.send(("log", (record.levelno, record.getMessage())))


def _run(pipe: Connection, cache: str, model: str, seed: int, inductor: bool, options: dict[str, Any]) -> None:
    os.environ["ONLINEQUANT_CACHE_DIR"] = cache
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # the tests' own, which would count as the user's choice
    saying = threading.Lock()
    logging.getLogger("onlinequant").addHandler(_Handler(pipe, saying))
    logging.getLogger("onlinequant").setLevel(logging.INFO)
    session = Session(model, seed, inductor, options)
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            return
        answer = getattr(session, command)(*arguments)
        with saying:
            pipe.send(("answer", answer))
