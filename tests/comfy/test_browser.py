"""The nodes in ComfyUI's own front-end: a workflow is loaded, run and looked at in a real browser.

The picture of it goes where the environment variable ``ONLINEQUANT_SCREENSHOT`` says; ``docs/comfyui.png`` is one.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from safetensors.torch import load_file, save_file

from onlinequant_backend.comfy_integration.presets import PRESETS
from tests.comfy.workflow import OPTIONS, SMALL_UNET

if TYPE_CHECKING:
    from tests.comfy.server import Server

pytestmark = [pytest.mark.comfy, pytest.mark.timeout(1800)]

VARIABLE = "ONLINEQUANT_SCREENSHOT"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
START_MS, RUN_MS, LOOK_MS = 180_000, 1_200_000, 60_000
STEPS = 6  # enough to say what is gained
CLOSE, EXACT = 23.0, 60.0  # PSNR in dB, as in test_server.py
UNET = "random_unet.safetensors"
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the templates cover everything
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def sampler(model: str) -> dict[str, Any]:
    return node(
        "KSampler",
        model=[model, 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["size", 0],
        seed=1,
        steps=STEPS,
        cfg=2.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=0.5,
    )


# All that the front-end exports: with the options that have a default, and without inputs that no node has.
NODES = {
    "unet": node("UNETLoader", unet_name=UNET, weight_dtype="default"),
    "checkpoint": node("CheckpointLoaderSimple", ckpt_name="tiny_sd15.safetensors"),
    "size": node("EmptyLatentImage", width=128, height=128, batch_size=1),
    "8 bit": node(
        "OnlineQuantModel",
        model=["unet", 0],
        **{
            **OPTIONS,
            "selection": "auto",
            "exclude": "middle_block.1.proj_*",
            "cuda_graphs": "auto",
            "observe_again": 0,
            "quantized_attention_percentage": 100,
        },
    ),
    "positive": node("CLIPTextEncode", clip=["checkpoint", 1], text="a photo of a cat"),
    "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text="blurry"),
    "sampled in 8 bit": sampler("8 bit"),
    "sampled in float": sampler("unet"),
    "picture": node("VAEDecode", samples=["sampled in 8 bit", 0], vae=["checkpoint", 2]),
    "reference": node("VAEDecode", samples=["sampled in float", 0], vae=["checkpoint", 2]),
    "report": node("OnlineQuantReport", model=["8 bit", 0], picture=["picture", 0], reference=["reference", 0]),
    "compare": node("OnlineQuantCompare", picture=["picture", 0], reference=["reference", 0]),
    "table": node("PreviewAny", source=["report", 0]),
}

# x, y, width and height, so that all of them fill a page.
PLACES = {
    "unet": (0, 0, 280, 82),
    "checkpoint": (0, 130, 280, 98),
    "size": (0, 276, 280, 106),
    "8 bit": (310, 0, 330, 320),
    "positive": (670, 0, 220, 160),
    "negative": (670, 208, 220, 160),
    "sampled in 8 bit": (920, 0, 260, 262),
    "sampled in float": (1210, 0, 260, 262),
    "picture": (1500, 0, 280, 46),
    "reference": (1500, 94, 280, 46),
    "table": (0, 430, 820, 560),
    "compare": (840, 430, 290, 560),
    "report": (1150, 310, 630, 680),
}
PAGE = {"width": 1800, "height": 1060}

LOAD = """async ([nodes, places]) => {
    app.loadApiJson(nodes, "onlinequant");
    await app.loadGraphData(app.graph.serialize());
    for (const [id, [x, y, width, height]] of Object.entries(places)) {
        const node = app.graph.getNodeById(id);
        node.pos = [x, y];
        node.setSize([width, height]);
    }
    app.extensionManager.focusMode = true;  // nothing but the graph
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [10, 60];
    app.canvas.draw(true, true);
}"""

# The front-end's own listeners come first: what a node shows when ours is called is the text of this event.
LISTEN = """() => {
    window.said = [];
    app.api.addEventListener("progress_text", ({detail}) => {
        const shown = app.graph.getNodeById(detail.nodeId).widgets.find(widget => widget.type === "progressText");
        said.push([detail.nodeId, shown.value]);
    });
    for (const end of ["success", "error", "interrupted"])
        app.api.addEventListener("execution_" + end, ({detail}) => { window.ended = [end, detail]; });
}"""

QUEUE = """async seed => {
    said.length = 0;
    window.ended = null;
    for (const node of app.graph.nodes.filter(node => node.type === "KSampler")) {
        const widget = name => node.widgets.find(widget => widget.name === name);
        widget("seed").value = seed;
        widget("control_after_generate").value = "fixed";
    }
    return await app.queuePrompt(0, 1);
}"""


# Whether a node shows the picture of the last run, given how nodes are drawn: by elements of the page or on a canvas.
SHOWN = """([vue, name]) => {
    const elements = document.querySelectorAll(`[data-node-id="${name}"] img`);
    const pictures = [...(vue ? elements : app.graph.getNodeById(name).imgs ?? [])];
    const last = app.nodeOutputs[name].images.map(image => image.filename);
    const isLoaded = (picture, i) => picture.src.includes(last[i]) && picture.complete && picture.naturalWidth > 0;
    return pictures.length === last.length && pictures.every(isLoaded);
}"""


class Visit(NamedTuple):
    """A page on which the workflow has run twice, with two seeds.

    Attributes:
        exported: the workflow before it ran, in the format of the API.
        runs: for each run, what the nodes said: pairs of a node and the text on it.
    """

    page: Page
    exported: dict[str, Any]
    runs: list[list[tuple[str, str]]]


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    """The front-end. None of its scripts may fail."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    for name, value in SETTINGS.items():
        server.post(f"/api/settings/{name}", value)
    add_model(server.base / "models/diffusion_models")  # first: a page asks only once which there are
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        page = browser.new_page(viewport=PAGE)
        page.set_default_timeout(LOOK_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_function("window.app?.graph && app.extensionManager && app.canvas", timeout=START_MS)
        yield page
        browser.close()
    assert not errors


@pytest.fixture(scope="module")
def visit(page: Page) -> Visit:
    page.evaluate(LISTEN)
    page.evaluate(LOAD, [NODES, PLACES])
    exported = page.evaluate("async () => (await app.graphToPrompt()).output")
    return Visit(page, exported, [run(page, seed) for seed in (1, 2)])


def add_model(folder: Path) -> None:
    """A model that no other test draws with: what was observed once serves all options, so none would see it again."""
    weights = load_file(folder / SMALL_UNET)
    save_file({name: weight * 1.01 for name, weight in weights.items()}, folder / UNET)


def run(page: Page, seed: int) -> list[tuple[str, str]]:
    """Press Run, so to speak, and wait for the end."""
    assert page.evaluate(QUEUE, seed), "the front-end or the server refuses the workflow"
    page.wait_for_function("window.ended", timeout=RUN_MS)
    end, detail = page.evaluate("window.ended")
    assert end == "success", detail
    return [(name, text) for name, text in page.evaluate("window.said")]


def test_the_front_end_exports_the_workflow_that_was_meant(visit: Visit) -> None:
    assert {name: node(each["class_type"], **each["inputs"]) for name, each in visit.exported.items()} == NODES


def test_the_model_node_says_that_it_observes_then_compiles_then_is_quantized(visit: Visit) -> None:
    first, second = ([text for name, text in run if name == "8 bit"] for run in visit.runs)
    kinds = list(dict.fromkeys(text.split()[0] for text in first))
    assert kinds == ["tracing", "observing", "compiling", "UNetModel:"]
    observing = [text.partition(" (")[0] for text in first if text.startswith("observing")]
    assert list(dict.fromkeys(observing)) == [f"observing {step} of {STEPS}" for step in range(1, STEPS + 1)]
    quantized, layers = map(int, re.findall(r"^UNetModel: quantized: (\d+) of (\d+) layers", first[-1])[0])
    # Two are excluded, those of the time embedding are thin, and a few would cost too much quality.
    assert layers / 2 < quantized <= layers - 2
    # The second run has shown what is gained.
    assert second and all(text.startswith(first[-1]) for text in second)
    assert re.search(r"· [\d.]+x$", second[-1])


def test_the_report_and_the_comparison_follow_each_run(visit: Visit) -> None:
    first, second = map(dict, visit.runs)
    assert "in float, observed" in first["report"] and "in 8 bit" not in first["report"]
    assert "in float, observed" in second["report"] and "in 8 bit" in second["report"]
    assert decibels(first["compare"]) > EXACT > decibels(second["compare"]) > CLOSE


def decibels(text: str) -> float:
    return math.inf if text == "equal" else float(re.findall(r"PSNR (\S+) dB", text)[0])


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "Vue"])
def test_texts_and_pictures_are_on_the_nodes(visit: Visit, vue: bool, tmp_path: Path) -> None:
    """In both of the front-end's ways to draw nodes."""
    page = visit.page
    page.evaluate("vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue)
    last = dict(said for run in visit.runs for said in run)
    assert set(last) == {"8 bit", "report", "compare"}
    for text in last.values():
        expect(page.get_by_text(text.splitlines()[0]).first).to_be_visible()
    expect(page.get_by_label("preview_text")).to_have_value(re.compile(r"middle_block\.1\.proj_in .* float .*excluded"))
    for name in ("report", "compare"):
        page.wait_for_function(SHOWN, arg=[vue, name])
    if not vue:
        take_screenshot(page, Path(os.environ.get(VARIABLE) or tmp_path / "comfyui.png"))


def take_screenshot(page: Page, to: Path) -> None:
    """In 256 colours, which are enough and a third of the size."""
    page.get_by_label("preview_text").evaluate("area => { area.scrollTop = 172; }")  # past where a file is
    page.evaluate("app.canvas.draw(true, true)")
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(to, optimize=True)


NEW_NODE = """kind => {
    const node = LiteGraph.createNode(kind);
    app.graph.add(node);
    return node.id;
}"""

# As by hand: the value, and then what the widget does about it.
CHANGE = """([id, name, value]) => {
    const widget = app.graph.getNodeById(id).widgets.find(widget => widget.name === name);
    widget.value = value;
    widget.callback(value);
}"""

VALUES = """id => Object.fromEntries(app.graph.getNodeById(id).widgets.map(widget => [widget.name, widget.value]))"""

TEXT = """id => app.graph.getNodeById(id)?.widgets?.find(widget => widget.type === "progressText")?.value"""


@pytest.fixture
def new_node(page: Page) -> Iterator[Any]:
    """A node that was added by hand."""
    node = page.evaluate(NEW_NODE, "OnlineQuantModel")
    yield node
    page.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", node)


def test_a_preset_fills_in_widgets_and_whoever_changes_one_leaves_it(page: Page, new_node: Any) -> None:
    assert page.evaluate(VALUES, new_node)["preset"] == "fast"
    page.evaluate(CHANGE, [new_node, "preset", "faithful"])
    assert page.evaluate(VALUES, new_node).items() >= PRESETS["faithful"].items()
    page.evaluate(CHANGE, [new_node, "exclude", "to_k"])
    assert page.evaluate(VALUES, new_node)["preset"] == "custom"
    for name, value in PRESETS["fast"].items():
        page.evaluate(CHANGE, [new_node, name, value])
    assert page.evaluate(VALUES, new_node)["preset"] == "fast"


@pytest.mark.parametrize(
    "kind", ["OnlineQuantModel", "OnlineQuantControlNet", "OnlineQuantReport", "OnlineQuantCompare"]
)
def test_a_new_node_is_wide_enough_for_what_it_shows(page: Page, kind: str) -> None:
    node = page.evaluate(NEW_NODE, kind)
    shows_pictures = kind in ("OnlineQuantReport", "OnlineQuantCompare")
    assert page.evaluate("id => app.graph.getNodeById(id).size[0]", node) >= (700 if shows_pictures else 360)
    page.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", node)


def test_a_workflow_from_before_there_were_presets_keeps_its_settings(page: Page, new_node: Any) -> None:
    saved = [90, 80, 100, 300, "int8", 5, "density", "to_k", "off", False]
    page.evaluate(
        "([id, values]) => { const node = app.graph.getNodeById(id); "
        "node.configure({ ...node.serialize(), widgets_values: values }); }",
        [new_node, saved],
    )
    values = page.evaluate(VALUES, new_node)
    assert list(values.values()) == ["custom", *saved, 0, 100]  # those of now have two more


@pytest.mark.parametrize("name", ["8 bit", "report", "compare"])
def test_the_help_page_opens(visit: Visit, name: str) -> None:
    page = visit.page
    page.evaluate("app.extensionManager.focusMode = false")
    with page.expect_response(f"**/docs/{NODES[name]['class_type']}/en.md") as response:
        page.evaluate("name => app.canvas.selectItems([app.graph.getNodeById(name)])", name)
        page.get_by_test_id("info-button").dispatch_event("click")  # it may lie outside of the window
    assert response.value.ok
    title = response.value.text().splitlines()[0].removeprefix("# ")
    expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()


def test_what_the_nodes_say_survives_a_reload_but_not_a_change_of_settings(visit: Visit) -> None:
    page = visit.page
    last = dict(said for run in visit.runs for said in run)
    page.reload()
    page.wait_for_function("window.app?.graph && app.extensionManager && app.canvas", timeout=START_MS)
    page.evaluate(LOAD, [NODES, PLACES])
    for name, text in last.items():
        page.wait_for_function(f"([id, text]) => ({TEXT})(id) === text", arg=[name, text])
    changed = {**NODES, "8 bit": node("OnlineQuantModel", **{**NODES["8 bit"]["inputs"], "precision": "fp8"})}
    page.evaluate(LOAD, [changed, PLACES])
    page.wait_for_function(f"([id, text]) => ({TEXT})(id) === text", arg=["report", last["report"]])
    assert page.evaluate(TEXT, "8 bit") is None
