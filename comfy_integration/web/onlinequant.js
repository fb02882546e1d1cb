// The parts of the nodes that need JavaScript: sizes, presets that fill in widgets, old workflows, texts after a reload.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

// Pixels, so that texts, tables and images are readable.
const WIDTHS = { OnlineQuantModel: 380, OnlineQuantControlNet: 380, OnlineQuantReport: 720, OnlineQuantCompare: 720 };

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** Calls `then` after a widget's own callback, when the user changes it. */
function onChange(widget, then) {
  const callback = widget.callback;
  widget.callback = function (...args) {
    const result = callback?.apply(this, args);
    then();
    return result;
  };
}

/** A preset fills in its widgets; changing one of them selects the preset that fits, or "custom". */
function connectPreset(node) {
  const preset = widgetOf(node, "preset");
  const presets = preset && node.constructor.nodeData?.input?.optional?.preset?.[1]?.presets;
  if (!presets) return;
  const fits = (values) => Object.entries(values).every(([name, value]) => widgetOf(node, name)?.value === value);
  onChange(preset, () => {
    for (const [name, value] of Object.entries(presets[preset.value] ?? {})) widgetOf(node, name).value = value;
    node.setDirtyCanvas(true);
  });
  for (const name of Object.keys(Object.values(presets)[0]))
    onChange(widgetOf(node, name), () => {
      preset.value = Object.keys(presets).find((each) => fits(presets[each])) ?? "custom";
      node.setDirtyCanvas(true);
    });
}

/** A workflow from before presets existed lacks the first value; its preset is "custom". */
function withPreset(saved) {
  const values = saved?.widgets_values;
  return Array.isArray(values) && typeof values[0] === "number"
    ? { ...saved, widgets_values: ["custom", ...values] }
    : saved;
}

/** Shows the server's texts again on nodes whose settings have not changed. */
async function showStatus() {
  const response = await api.fetchApi("/onlinequant/status");
  if (!response.ok) return;
  for (const { node: id, type, settings, text } of await response.json()) {
    const node = app.graph.getNodeById(id) ?? app.graph.getNodeById(Number(id));
    const isAsItWas = ([name, value]) => {
      const widget = node.inputs?.some((input) => input.widget?.name === name && input.link != null)
        ? undefined
        : widgetOf(node, name);
      return widget === undefined || widget.value === value;
    };
    if (node?.comfyClass === type && Object.entries(settings).every(isAsItWas))
      api.dispatchCustomEvent("progress_text", { nodeId: id, text });
  }
}

app.registerExtension({
  name: "onlinequant",
  setup() {
    api.addEventListener("reconnected", showStatus);
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.input?.optional?.preset?.[1]?.presets) return;
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (saved) {
      return configure.call(this, withPreset(saved));
    };
  },
  nodeCreated(node) {
    const width = WIDTHS[node.comfyClass];
    if (width === undefined) return;
    node.setSize([Math.max(node.size[0], width), node.size[1]]);
    connectPreset(node);
  },
  afterConfigureGraph: showStatus,
});
