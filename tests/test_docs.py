"""What the README and the documentation tell people to run or to read is there: code blocks, commands, paths, links."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import onlinequant_backend
from onlinequant_backend.cache.cache_store import Cache
from onlinequant_backend.cli import main
from tests.helpers.calibrations import CALIBRATION, KEY, STATS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CLONE = "custom_nodes/onlinequant/"  # where the checkout lies in ComfyUI's folder
_FENCE = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FLAG = re.compile(r"--[a-z][\w-]*")


class Block(NamedTuple):
    """A fenced code block.

    Attributes:
        line: the number of its first line of code.
        reason: why it cannot run here; None if it can.
    """

    language: str
    text: str
    line: int
    reason: str | None


def blocks(page: Path, language: str) -> list[Block]:
    """The page's code blocks in one language."""
    content = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(content):
        line = content.count("\n", 0, match.start("text")) + 1
        found.append(Block(match["language"], match["text"], line, match["reason"]))
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """What the page's prose has in code type, each on one line."""
    return [" ".join(span.split()) for span in _SPAN.findall(prose(page))]


def name(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def small_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines are tiny ones made here, with options that quantize so small layers. Wrong options raise at once, and
    8-bit graphs run op by op."""
    import torch
    from diffusers import StableDiffusionPipeline

    from onlinequant_backend.torch_internals import inductor_interface
    from tests.helpers import tiny_pipeline
    from tests.helpers.tiny import OPTIONS

    def from_pretrained(_model: str, *, torch_dtype: torch.dtype) -> StableDiffusionPipeline:
        assert torch_dtype is torch.float32
        return tiny_pipeline.pipeline(tmp_path / "tokenizer")

    def compile_checked(model: Any, *, backend: str, options: dict[str, Any] | None = None) -> Any:
        assert backend == "onlinequant"
        onlinequant_backend.QuantConfig.from_options(options)
        return torch_compile(model, backend=backend, options={**OPTIONS, **(options or {})})

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_checked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(inductor_interface, "compile_fx", lambda graph, inputs, options, outside_dynamo: graph)


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would run them."""
    monkeypatch.chdir(tmp_path)  # they write pictures
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, page, "exec")
        if block.reason is None:
            exec(code, namespace)
    assert {report.phase for report in onlinequant_backend.reports()} <= {"quantized"}


@pytest.mark.usefixtures("small_models")
def test_the_example_says_what_the_report_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diffusers_sd15.py", "--steps", "2"])
    for source in ("3 calls observed", "from the cache"):  # PNDM makes three calls for two steps
        runpy.run_path(str(ROOT / "examples" / "diffusers_sd15.py"), run_name="__main__")
        out = capsys.readouterr().out
        for picture in ("first.png", "second.png"):
            assert re.search(rf"^{picture}: .*quantized: \d+ of \d+ layers in int8; {source}$", out, re.M), out
        onlinequant_backend.reset()
        torch.compiler.reset()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=name)
def test_shell_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "sh"):
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["onlinequant"] and words[1] not in ("demo", "doctor"):  # these take their time
                assert _run_with_one_entry([KEY if word == "KEY" else word for word in words[1:]]) == 0
            elif words:
                check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_the_text_exist(page: Path) -> None:
    for span in spans(page):
        if re.match(r"(python|bash|onlinequant|pip) ", span):
            check_command(shlex.split(span))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_the_text_exist(page: Path) -> None:
    paths = [span for span in spans(page) if re.fullmatch(r"[\w./]+/|[\w.]+/[\w./]+\.\w+", span)]
    made = {"build/scenes", "build/site", "passes/my_pass.py"}
    assert [path for path in paths if path not in made and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> list[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return [re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings]


def test_the_options_in_the_readme_have_these_defaults() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Options")[2].partition("## ")[0]
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \| ", section, re.M)
    stated = {option: default.strip("`") for names, default in rows for option in re.findall(r"`(\w+)`", names)}
    defaults = {field.name: repr(field.default).replace("'", '"') for field in fields(onlinequant_backend.QuantConfig)}
    assert stated
    assert stated.items() <= defaults.items()


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: onlinequant_backend\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(listed) == sorted(onlinequant_backend.__all__)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "decisions"], ids=name)
def test_every_decision_is_a_whole_record(page: Path) -> None:
    for record in page.read_text(encoding="utf-8").split("\n### ")[1:]:
        found = re.findall(r"^(\d{4}-\d\d-\d\d$|- \*\*\w+:\*\* \S)", record, re.M)
        kinds = [text.strip("- *:").split(":")[0] for text in found[1:]]
        assert kinds == ["Context", "Decision", "Measurement", "Command"], record.splitlines()[0]


def check_command(words: list[str]) -> None:
    """Raise AssertionError for a command that names a script, a path or an option that does not exist."""
    kinds: dict[str, Callable[[list[str]], None]] = {
        "onlinequant": _check_own_command,
        "python -m onlinequant_backend.cli": _check_own_command,
        "python -m pip install": _check_installation,
        "pip install": _check_installation,
        "python -m pip uninstall --yes onlinequant": lambda arguments: None,
        "git push origin": lambda arguments: None,
        "git tag": lambda arguments: None,
        "comfy node": lambda arguments: None,
        "python -c": lambda arguments: exec(compile(arguments[0], "-c", "exec"), {}),
        "python": _check_script,
        "bash run.sh": _check_run,
        "git clone THIS_REPOSITORY": lambda arguments: None,
        ".venv/bin/pre-commit install": lambda arguments: None,
    }
    for beginning, check in kinds.items():
        count = len(beginning.split())
        if words[:count] == beginning.split():
            check(words[count:])
            return
    raise AssertionError(f"no way to check the command {shlex.join(words)!r}")


def _check_own_command(arguments: list[str]) -> None:
    """Its help names all of its options."""
    command = [word for word in arguments[:1] if word != "COMMAND"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0, arguments
    assert set(filter(_FLAG.fullmatch, arguments)) <= set(_FLAG.findall(printed.getvalue())), arguments


def _run_with_one_entry(arguments: list[str]) -> int:
    """Run ``onlinequant`` with a cache that has an entry."""
    Cache.open(None).publish(KEY, CALIBRATION, STATS)
    return main(arguments)


def _check_installation(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before == "-r":
            assert (ROOT / word.removeprefix(CLONE)).is_file(), word
        extra = re.fullmatch(r"\.\[(\w+)\]", word)
        assert extra is None or extra[1] in extras, word


def _check_script(arguments: list[str]) -> None:
    script = ROOT / arguments[0]
    assert script.is_file(), arguments[0]
    assert set(filter(_FLAG.fullmatch, arguments)) <= set(_options(script)), arguments
    for word in arguments:
        if word.startswith("{"):  # options of the backend
            onlinequant_backend.QuantConfig.from_options(json.loads(word))


def _options(script: Path) -> Iterator[str]:
    """The options that a script may have: those that it and the modules beside it spell out."""
    text = script.read_text(encoding="utf-8")
    yield from re.findall(r'"(--[a-z][\w-]*)"', text)
    for module in re.findall(r"^\s*(?:from|import) (?:benchmarks\.)?(\w+)", text, re.M):
        beside = script.parent / f"{module}.py"
        if beside.is_file():
            yield from _options(beside)


def _check_run(arguments: list[str]) -> None:
    commands = re.findall(r"^(\w+)\)$", (ROOT / "run.sh").read_text(), re.M)
    assert arguments[0] in commands, arguments
