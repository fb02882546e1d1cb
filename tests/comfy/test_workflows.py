"""The example workflows and the help pages, compared with each other.

Where asked for, they are compared with a real ComfyUI, too.
"""

from __future__ import annotations

import itertools
import json
import re
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from example_workflows.formats import api_format, ui_format
from example_workflows.thumbnail import THUMBNAIL
from example_workflows.workflows import workflows

if TYPE_CHECKING:
    from tests.comfy.conftest import Server

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "example_workflows"
HELP = ROOT / "comfy_integration" / "web" / "docs"
NODES = re.findall(r'node_id="(\w+)"', (ROOT / "comfy_integration" / "nodes.py").read_text())

NAMES = [f"{model}_{kind}" for model in ("sdxl", "sd15", "svd") for kind in ("baseline", "compiled", "quantized")]
NAMES += ["sdxl_report", "sdxl_compare", "sdxl_lora_controlnet"]
TITLES = {name: workflow.title for name, workflow in workflows().items()}
CHECKPOINTS = {
    "sdxl": "sd_xl_base_1.0.safetensors",
    "sd15": "v1-5-pruned-emaonly.safetensors",
    "svd": "svd_xt_1_1.safetensors",
}
TITLE = 30  # pixels above a node
# Widgets whose value is followed by that of a widget that only the front end knows.
FOLLOWED = {("KSampler", "seed"), ("PrimitiveInt", "value"), ("LoadImage", "image")}
# A file that need not lie in the ComfyUI of the tests.
FILES = {"ckpt_name", "lora_name", "control_net_name", "image"}
PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}

each_workflow = pytest.mark.parametrize("name", NAMES)


def read_ui(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{TITLES[name]}.json").read_text()))


def read_api(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / "api" / f"{name}.json").read_text()))


def converted(ui: dict[str, Any]) -> dict[str, Any]:
    """A UI graph in API format, as the front end would post it; for the nodes that the workflows have."""
    links = {link: (str(origin), output) for link, origin, output, *_ in ui["links"]}
    nodes = {}
    for node in ui["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        inputs: dict[str, Any] = {}
        values = iter(node["widgets_values"])
        for entry in node["inputs"]:
            if "widget" in entry:
                inputs[entry["name"]] = next(values)
                if (node["type"], entry["name"]) in FOLLOWED:
                    next(values)
            if entry["link"] is not None:
                inputs[entry["name"]] = list(links[entry["link"]])
        assert not list(values), node["type"]
        title = {"_meta": {"title": node["title"]}} if "title" in node else {}
        nodes[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], **title}
    return nodes


def test_every_workflow_is_there_in_both_formats() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.json")) == sorted(TITLES.values())
    assert sorted(file.stem for file in FOLDER.glob("api/*.json")) == sorted(NAMES)
    assert sorted(workflows()) == sorted(NAMES)


@each_workflow
def test_the_files_are_what_the_script_makes(name: str) -> None:
    workflow = workflows()[name]
    assert read_api(name) == api_format(workflow)
    (note,) = (node for node in read_ui(name)["nodes"] if node["type"] == "MarkdownNote")
    assert note["widgets_values"] == [workflow.note]


@each_workflow
def test_both_formats_agree(name: str) -> None:
    assert converted(read_ui(name)) == read_api(name)


@each_workflow
def test_links_are_the_same_from_both_ends(name: str) -> None:
    ui = read_ui(name)
    nodes = {node["id"]: node for node in ui["nodes"]}
    assert len(nodes) == len(ui["nodes"]) and ui["last_node_id"] == max(nodes)
    assert [link[0] for link in ui["links"]] == list(range(1, ui["last_link_id"] + 1))
    for link, origin, output, target, slot, kind in ui["links"]:
        assert link in nodes[origin]["outputs"][output]["links"]
        assert nodes[origin]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["link"] == link
    ends = [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"] is not None]
    starts = [link for node in nodes.values() for entry in node["outputs"] for link in entry["links"]]
    assert sorted(ends) == sorted(starts) == list(range(1, ui["last_link_id"] + 1))


@each_workflow
def test_nothing_overlaps_and_every_node_is_inside_a_group(name: str) -> None:
    ui = read_ui(name)
    boxes = {}
    for node in ui["nodes"]:
        (left, top), (width, height) = node["pos"], node["size"]
        boxes[node["id"], node["type"]] = (left, top - TITLE, left + width, top + height)
    frames = {}
    for group in ui["groups"]:
        left, top, width, height = group["bounding"]
        frames[group["title"]] = (left, top, left + width, top + height)
    for same_kind in (boxes, frames):
        for (one, a), (other, b) in itertools.combinations(same_kind.items(), 2):
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, (one, other)
    for (_, kind), (left, top, right, bottom) in boxes.items():
        around = [f for f in frames.values() if f[0] <= left and f[1] <= top and f[2] >= right and f[3] >= bottom]
        assert len(around) == (0 if kind == "MarkdownNote" else 1), kind


@each_workflow
def test_the_model_is_the_one_of_the_name(name: str) -> None:
    model, _, kind = name.partition("_")
    nodes = list(read_api(name).values())
    loaded = [node["inputs"]["ckpt_name"] for node in nodes if "ckpt_name" in node["inputs"]]
    assert loaded == [CHECKPOINTS[model]]
    kinds = [node["class_type"] for node in nodes]
    assert kinds.count("TorchCompileModel") == (kind == "compiled")
    assert kinds.count("OnlineQuantModel") == (kind not in ("baseline", "compiled"))
    assert kinds.count("OnlineQuantReport") == (kind in ("report", "compare", "lora_controlnet"))
    assert kinds.count("OnlineQuantCompare") == (kind == "compare")
    assert [kinds.count(node) for node in ("LoraLoader", "OnlineQuantControlNet")] == [kind == "lora_controlnet"] * 2


@pytest.mark.parametrize(("model", "size"), [("sdxl", (1024, 1024)), ("sd15", (512, 512)), ("svd", (1024, 576))])
def test_variants_of_a_model_differ_in_nothing_but_the_path_of_the_model(model: str, size: tuple[int, int]) -> None:
    """So that their times can be compared."""
    baseline, compiled, quantized = (
        without_compiling(f"{model}_{variant}") for variant in ("baseline", "compiled", "quantized")
    )
    assert baseline == compiled == quantized
    values = [node["inputs"] for node in baseline]
    assert [(each["width"], each["height"]) for each in values if "width" in each] == [size]
    assert [each["video_frames"] for each in values if "video_frames" in each] == [25] * (model == "svd")


def without_compiling(name: str) -> list[dict[str, Any]]:
    """The nodes of a workflow whose model goes straight to where it goes, with the place of each node as its name."""
    nodes = read_api(name)
    shortcuts = {
        key: node["inputs"]["model"]
        for key, node in nodes.items()
        if node["class_type"] in ("TorchCompileModel", "OnlineQuantModel")
    }
    assert len(shortcuts) == (not name.endswith("baseline"))
    rest = [key for key in nodes if key not in shortcuts]

    def plain(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        origin, output = shortcuts.get(value[0], value)
        return rest.index(origin), output

    found = []
    for key in rest:
        inputs = {which: plain(value) for which, value in nodes[key]["inputs"].items() if which != "filename_prefix"}
        found.append({"class_type": nodes[key]["class_type"], "inputs": inputs})
    return found


@each_workflow
def test_each_has_a_small_picture_of_its_own(name: str) -> None:
    others = {(FOLDER / f"{title}.jpg").read_bytes() for key, title in TITLES.items() if key != name}
    file = FOLDER / f"{TITLES[name]}.jpg"
    assert file.read_bytes() not in others and file.stat().st_size < 40_000
    assert Image.open(file).size == THUMBNAIL


@each_workflow
def test_the_seed_changes_after_each_run(name: str) -> None:
    """ComfyUI does not run a workflow again that has not changed, so that the second run would show nothing."""
    values = [value for node in read_ui(name)["nodes"] for value in node["widgets_values"]]
    assert "increment" in values


@each_workflow
def test_files_to_download_are_named_where_they_are_loaded(name: str) -> None:
    for node in read_ui(name)["nodes"]:
        files = {file["name"] for file in node["properties"].get("models", ())}
        assert files == {value for value in node["widgets_values"] if str(value).endswith(".safetensors")}


def test_every_node_has_a_help_page_that_names_each_parameter() -> None:
    assert sorted(folder.name for folder in HELP.iterdir()) == sorted(NODES)
    for node in NODES:
        page = (HELP / node / "en.md").read_text()
        for workflow in map(read_api, NAMES):
            for used in workflow.values():
                if used["class_type"] == node:
                    assert all(f"`{parameter}`" in page for parameter in used["inputs"]), node


def test_every_node_is_in_a_workflow() -> None:
    used = {node["class_type"] for name in NAMES for node in read_api(name).values()}
    assert set(NODES) <= used


@pytest.fixture(scope="module")
def schemas(server: Server) -> dict[str, Any]:
    """What ComfyUI says about every node."""
    return dict(server.get("/object_info"))


@pytest.mark.comfy
@each_workflow
def test_comfyui_would_take_it(schemas: dict[str, Any], name: str) -> None:
    """What its validation checks. It is not asked itself: the checkpoints are missing, and it would start the rest."""
    workflow = read_api(name)
    assert any(schemas[node["class_type"]]["output_node"] for node in workflow.values())
    for node in workflow.values():
        schema = schemas[node["class_type"]]
        required, optional = (schema["input"].get(section, {}) for section in ("required", "optional"))
        assert required.keys() <= node["inputs"].keys() <= {*required, *optional}, node["class_type"]
        for parameter, value in node["inputs"].items():
            kind, *rest = {**required, **optional}[parameter]
            where = (node["class_type"], parameter)
            if isinstance(value, list):
                origin, output = value
                given = schemas[workflow[origin]["class_type"]]["output"][output]
                assert kind == "*" or given in kind.split(","), where
            else:
                check_value(kind, rest[0] if rest else {}, value, where)


def check_value(kind: Any, options: dict[str, Any], value: Any, where: tuple[str, str]) -> None:
    """A widget's."""
    if isinstance(kind, list) or kind == "COMBO":
        assert where[1] in FILES or value in (kind if isinstance(kind, list) else options["options"]), where
        return
    assert isinstance(value, PYTHON_TYPES[kind]), where
    if kind in ("INT", "FLOAT"):
        assert options.get("min", value) <= value <= options.get("max", value), where


@pytest.mark.comfy
@each_workflow
def test_the_ui_file_fits_this_comfyui(schemas: dict[str, Any], name: str) -> None:
    assert read_ui(name) == ui_format(workflows()[name], schemas)


@pytest.mark.comfy
def test_comfyui_lists_and_serves_the_workflows(server: Server) -> None:
    assert sorted(server.get("/api/workflow_templates")["onlinequant"]) == sorted(TITLES.values())
    for name, title in TITLES.items():
        place = f"/api/workflow_templates/onlinequant/{urllib.parse.quote(title)}"
        assert server.get(f"{place}.json") == read_ui(name)
        with urllib.request.urlopen(f"{server.url}{place}.jpg") as picture:
            assert picture.read() == (FOLDER / f"{title}.jpg").read_bytes()


@pytest.mark.comfy
@pytest.mark.parametrize("node", NODES)
def test_comfyui_serves_the_help_page(server: Server, schemas: dict[str, Any], node: str) -> None:
    """Where the front end looks for it: under the name of the folder that the node comes from."""
    folder = schemas[node]["python_module"].removeprefix("custom_nodes.")
    with urllib.request.urlopen(f"{server.url}/extensions/{folder}/docs/{node}/en.md") as page:
        assert page.read().decode() == (HELP / node / "en.md").read_text()
