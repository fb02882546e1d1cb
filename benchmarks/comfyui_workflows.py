"""What a person waits for in ComfyUI: the project's workflows at full size in real servers, in all three variants.

    python benchmarks/comfyui_workflows.py --comfyui ComfyUI --base work --output results --seconds 560
    python benchmarks/comfyui_workflows.py --comfyui ComfyUI --base work --output results --no-table --changes lora size
    python benchmarks/comfyui_workflows.py --show results/*.jsonl

Each workflow is run without a compiler, with ComfyUI's own TorchCompileModel, and with OnlineQuant; the templates in
``example_workflows/api`` differ in nothing else. Models have random weights, which take as long as real ones, and are
written into the base directory where they are missing. Servers run one after the other, with ComfyUI's default flags
but for what is asked for, each variant of each workflow with caches of its own, which are empty at first.

- "first prompt": from a cold start, with loading the model; seconds are ComfyUI's own.
- "later prompts": the median of some with other seeds, when nothing is compiled any more; "of these the sampler": the
  KSampler node alone.
- "first after a restart": another server, which finds what the first one has saved. The baseline saves nothing.
- "GPU memory": the most of the whole GPU that was in use, all in all and during later prompts.
- "latent error": ``||result - baseline|| / ||baseline||`` of the latent image of the same seed; "PSNR": of the picture.

``--changes`` then makes them one by one in one server for each variant: a LoRA before and after the node, another size,
and so on. "traces" are Dynamo's graphs, "compiles" Inductor's that were not in its cache, "then compiled for" the
seconds after the prompt until all was in 8 bit again.

Every record is written at once, so that little is lost where time runs out: what is missing can be run by another call
with the same ``--base`` (``--workflows``, ``--variants``), and ``--show`` makes the tables of all calls together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import comfyui_graphs as graphs  # noqa: E402
from benchmarks import comfyui_pictures as pictures  # noqa: E402
from benchmarks import comfyui_tables as tables  # noqa: E402
from benchmarks.comfyui_graphs import CHANGES, VARIANTS, WORKFLOWS, Change  # noqa: E402
from benchmarks.comfyui_server import (  # noqa: E402
    Clock,
    GpuMemory,
    Installation,
    OutOfTimeError,
    Server,
    ServerError,
)

COLD_SECONDS = 420  # the most that is waited for the compile of a cold start
PASSED_ON = ("--disable-cuda-malloc", "--gpu-only", "--lowvram")
FOR_CPUS = ("--cpu", "--use-pytorch-cross-attention")  # the other attention asks psutil, which breaks graphs


class Benchmark:
    """One call of this program."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._base: Path = options.base.resolve()
        self._output: Path = options.output.resolve()
        self._clock = Clock(options.seconds)
        self._memory = GpuMemory()
        self._start = time.time()
        self._servers = 0
        self._lock = threading.Lock()
        self.records: list[dict[str, Any]] = []
        self._workflows = {
            name: WORKFLOWS[name].made_tiny() if options.tiny else WORKFLOWS[name] for name in options.workflows
        }
        flags = [*(FOR_CPUS if options.tiny else ()), *options.passed_on, *shlex.split(options.flags)]
        launcher = options.launcher and options.launcher.resolve()
        self._output.mkdir(parents=True, exist_ok=True)
        self._installation = Installation(
            options.comfyui.resolve(), self._base, options.python, launcher, flags, self._output
        )

    def run(self) -> None:
        """All that was asked for; what fails or has no time left is recorded, and the rest goes on."""
        self._installation.lay_out()
        if not self._tried("random models", self._write_models):
            return
        cold: list[str] = []
        if self._options.table and self._options.together:
            cold = self._compile_together()
        for name in self._workflows if self._options.table else ():
            for variant in self._options.variants or VARIANTS:
                is_warm = variant == "compiled" and name in cold
                self._tried(f"{name}, {variant}", self._measure, name, variant, is_warm)
        for name in self._workflows if self._options.changes else ():
            for variant in self._options.variants or ("baseline", "quantized"):
                self._tried(f"{name}, {variant}, changes", self._change, name, variant)

    def _write_models(self) -> None:
        wanted = self._options.changes or ()
        models = [model for workflow in self._workflows.values() for model in graphs.models(workflow, wanted)]
        folders = {"checkpoint": "checkpoints", "lora": "loras", "controlnet": "controlnet"}
        missing = [
            model for model in models if not (self._base / "models" / folders[model["kind"]] / model["file"]).exists()
        ]
        if missing:
            with self._server("models", self._base / "caches" / "none") as server:
                for model in missing:
                    for sentence in server.write_models([model], self._options.tiny):
                        self._say(sentence)

    # --- The table ---

    def _measure(self, name: str, variant: str, is_warm: bool = False) -> None:
        """One row; ``is_warm``: its first prompt was already run."""
        place = {"workflow": name, "variant": variant}
        caches = self._caches(name, variant)
        if not (is_warm or self._options.keep_caches):
            shutil.rmtree(caches, ignore_errors=True)
        with self._server(f"{name}-{variant}", caches, **place) as server:
            if is_warm:
                self._prompt(server, place, "restart", 1)
            else:
                self._cold_start(server, place)
            for seed in range(2, 2 + self._options.later):
                self._prompt(server, place, "later", seed)
        if variant != "baseline" and not is_warm:
            with self._server(f"{name}-{variant}-again", caches, **place) as server:
                self._prompt(server, place, "restart", 1)
                self._record(what="settled", part="restart settled", **place, **server.settle(self._options.wait))

    def _cold_start(self, server: Server, place: dict[str, str]) -> None:
        """The first prompt, some while it is compiled in the background, and the time until it is in 8 bit."""
        start = time.monotonic()
        part = "restart" if self._options.keep_caches and place["variant"] != "baseline" else "first"
        self._prompt(server, place, part, 1)
        for seed in range(50, 50 + self._options.during):
            if server.settle(0)["waited"] is not None:
                break
            self._prompt(server, place, "during", seed)
        settled = server.settle(COLD_SECONDS)
        if place["variant"] == "quantized" and part == "first":
            until = None if settled["waited"] is None else time.monotonic() - start
            peak = self._memory.peak
            self._record(what="settled", part="settled", **place, until_8_bit=until, peak_mib=peak, **settled)
            self._say(f"{place['workflow']}: in 8 bit {tables.seconds(until)} after the first prompt was posted")

    def _compile_together(self) -> list[str]:
        """TorchCompileModel's first prompts of all workflows at the same time; those that were run."""
        done: list[str] = []

        def compile_one(name: str) -> None:
            place = {"workflow": name, "variant": "compiled"}
            caches = self._caches(name, "compiled")
            shutil.rmtree(caches, ignore_errors=True)
            with self._server(f"{name}-compiled-together", caches, **place) as server:
                self._prompt(server, place, "first", 1, alone=False)
                done.append(name)

        threads = [
            threading.Thread(target=self._tried, args=(f"{name}, compiled, together", compile_one, name))
            for name in self._workflows
            if "compiled" in (self._options.variants or VARIANTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return done

    # --- The changes ---

    def _change(self, name: str, variant: str) -> None:
        """All changes of a workflow, one after the other, after two prompts without one."""
        place = {"workflow": name, "variant": variant}
        workflow = self._workflows[name]
        seeds = graphs.seeds(workflow)
        caches = self._caches(name, variant)
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(self._server(f"{name}-{variant}-changes", caches, **place))
            for seed in (90, 91):
                self._prompt(server, place, "change", seed, settle=COLD_SECONDS, label=f"none: unchanged {seed - 89}")
            for change, steps in graphs.changes(workflow).items():
                if change not in self._options.changes:
                    continue
                for index, step in enumerate(steps):
                    if step.before == "free":
                        server.free()
                    elif step.before == "restart":
                        stack.close()
                        server = stack.enter_context(self._server(f"{name}-{variant}-changes-again", caches, **place))
                    label = f"{change} {index}: {step.label}"
                    self._prompt(
                        server,
                        place,
                        "change",
                        seeds[change, index],
                        change=step.change,
                        settle=self._options.wait,
                        label=label,
                    )

    # --- One prompt ---

    def _prompt(
        self,
        server: Server,
        place: dict[str, str],
        part: str,
        seed: int,
        *,
        change: Change | None = None,
        settle: float = 0,
        label: str = "",
        alone: bool = True,
    ) -> None:
        """Run one, compare its picture with the baseline's, and record it.

        ``settle``: seconds to wait for compiles behind it, which then count as its own. ``alone``: whether nothing else
        has used the GPU.
        """
        name, variant = place["workflow"], place["variant"]
        workflow = self._workflows[name]
        result = server.prompt(graphs.graph(workflow, variant, seed, change))
        if settle:
            after = server.settle(settle)
            result["waited"] = after.pop("waited")
            for count, value in after.items():
                result[count] += value
        if not alone:
            result["peak_mib"] = None
        reference = self._base / "references" / f"{name}-{workflow.prefix}" / (label.replace(":", "") or f"seed {seed}")
        if variant == "baseline":
            pictures.keep(result["files"], reference)
        elif reference.exists():
            result |= pictures.distances(result["files"], reference)
        self._record(what="prompt", part=part, **place, seed=seed, label=label, alone=alone, **result)
        self._say(f"{name}, {variant}, {label or f'{part} (seed {seed})'}: {tables.in_short(result)}")
        if result["status"] != "success":
            raise ServerError(result["messages"])

    # --- Records ---

    @contextlib.contextmanager
    def _server(self, name: str, caches: Path, **place: str) -> Iterator[Server]:
        """A running one; what its log says is recorded at its end."""
        if self._clock.left() < self._options.least:
            raise OutOfTimeError
        with self._lock:
            self._servers += 1
            name = f"{int(self._start)}-{self._servers:02}-{name}"
        server = Server(self._installation, name, caches, self._clock, self._memory)
        self._say(f"{name} answers after {server.start_seconds:.1f} s")
        try:
            with server:
                yield server
        finally:
            seconds = round(server.start_seconds, 2)
            self._record(what="server", server=name, **place, start_seconds=seconds, **server.trouble())

    def _tried(self, text: str, part: Any, *arguments: Any) -> bool:
        """Whether a part was run to its end."""
        try:
            part(*arguments)
        except OutOfTimeError:
            self._record(what="not run", text=text, reason="no time left")
        except Exception as error:
            self._record(what="not run", text=text, reason=str(error) or repr(error), trace=traceback.format_exc())
        else:
            self._record(what="done", text=text)
            return True
        self._say(f"not run (to its end): {text}: {self.records[-1]['reason'][-1500:]}")
        return False

    def _record(self, **record: Any) -> None:
        record |= {"run": self._start, "time": time.time(), "tiny": self._options.tiny}
        record["flags"] = list(self._installation.flags)
        with self._lock:
            self.records.append(record)
            with (self._output / "comfyui_workflows.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _say(self, text: str) -> None:
        print(f"[{time.time() - self._start:6.1f}] {text}", flush=True)

    def _caches(self, name: str, variant: str) -> Path:
        return self._base / "caches" / f"{name}-{self._workflows[name].prefix}-{variant}"


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--comfyui", type=Path, help="a checkout of ComfyUI")
    result.add_argument("--python", type=Path, default=Path(sys.executable), help="what runs it")
    result.add_argument("--launcher", type=Path, help="a script to start instead of main.py; its argument: --comfyui")
    result.add_argument("--base", type=Path, help="ComfyUI's base directory, made if missing; kept between calls")
    result.add_argument("--output", type=Path, default=Path("comfyui-results"), help="folder of records and logs")
    result.add_argument("--workflows", nargs="+", default=list(WORKFLOWS), choices=WORKFLOWS)
    result.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all; for changes without compiled")
    result.add_argument("--changes", nargs="*", choices=CHANGES, help="the changes as well; without names: all")
    result.add_argument("--no-table", dest="table", action="store_false", help="nothing but the changes")
    result.add_argument("--together", action="store_true", help="TorchCompileModel's first prompts at the same time")
    result.add_argument("--keep-caches", action="store_true", help="begin with what an earlier call has compiled")
    result.add_argument("--later", type=int, default=4, metavar="N", help="prompts in the steady state")
    result.add_argument("--during", type=int, default=2, metavar="N", help="prompts while OnlineQuant compiles")
    result.add_argument("--seconds", type=float, default=math.inf, help="begin and wait for nothing after these")
    result.add_argument("--wait", type=float, default=240, metavar="SECONDS", help="the most for a change to compile")
    result.add_argument("--least", type=float, default=30, help="start no server in the last seconds; default: 30")
    result.add_argument("--tiny", action="store_true", help="tiny models, three steps, 128x128: for CPUs")
    result.add_argument("--flags", default="", help="more arguments of ComfyUI's: --flags='--fast --reserve-vram 2'")
    for flag in PASSED_ON:
        result.add_argument(flag, dest="passed_on", action="append_const", const=flag, help="passed on to ComfyUI")
    result.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="tables of what calls have written")
    result.set_defaults(passed_on=[])
    return result


def main() -> None:
    arguments = parser()
    options = arguments.parse_args()
    if options.changes == []:
        options.changes = list(CHANGES)
    if options.show:
        tables.show([json.loads(line) for file in options.show for line in file.read_text().splitlines()])
        return
    if options.comfyui is None or options.base is None:
        arguments.error("--comfyui and --base are needed (or --show)")
    if not (options.comfyui / "main.py").exists():
        arguments.error(f"{options.comfyui} is no checkout of ComfyUI: it has no main.py")
    benchmark = Benchmark(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # with the servers stopped and tables shown
    try:
        benchmark.run()
    finally:
        tables.show(benchmark.records)


if __name__ == "__main__":
    main()
