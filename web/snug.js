// @ts-check
/** What ComfyUI's page loads of Snug: the memory panel in the sidebar, and what nodes show of their own. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addBlindWidget } from "./compare/blind_node.mjs";
import { addCompareWidget } from "./compare/compare_node.mjs";
import { TelemetryClient } from "./telemetry/client.mjs";
import { Queue, addMonitorWidget } from "./telemetry/node_widget.mjs";
import { chooseFirstFiles } from "./telemetry/graph.mjs";
import { mountPanel } from "./telemetry/panel/panel.mjs";
import { Store } from "./telemetry/store.mjs";

const STYLES = [
  "snug.css",
  "telemetry/panel/panel.css",
  "telemetry/panel/bar.css",
  "telemetry/panel/timeline.css",
  "compare/compare.css",
];
const TAB = "snug.memory";
/** In the browser's memory of this tab: the panel is opened again after the page was loaded anew. */
const WAS_OPEN = "snug.memory.open";

const store = new Store();
const client = new TelemetryClient(api, store.dispatch);
const queue = new Queue(api);
/** @type {HTMLElement | undefined} */
let container;
/** @type {(() => void) | undefined} */
let unmount;

/** ComfyUI calls this several times for one container. @param {HTMLElement} element */
function render(element) {
  if (element === container && unmount && element.childElementCount) return;
  destroy();
  container = element;
  unmount = mountPanel(element, app, client, store);
  sessionStorage.setItem(WAS_OPEN, "yes");
}

/** ComfyUI calls this whenever the panel is hidden, and may do so twice. */
function destroy() {
  unmount?.();
  unmount = container = undefined;
  sessionStorage.removeItem(WAS_OPEN);
}

function openPanel() {
  const { sidebarTab, command } = app.extensionManager;
  if (sidebarTab?.activeSidebarTabId === TAB) return;
  if (sidebarTab?.toggleSidebarTab) sidebarTab.toggleSidebarTab(TAB);
  else command?.execute(`Workspace.ToggleSidebarTab.${TAB}`);
}

function addStyles() {
  for (const file of STYLES) {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL(file, import.meta.url).href;
    document.head.append(link);
  }
}

app.registerExtension({
  name: "Snug.Memory",
  commands: [
    {
      id: "Snug.OpenMemoryPanel",
      label: "Snug: open the memory panel",
      icon: "pi pi-chart-bar",
      tooltip: "Shows where the memory goes: devices, models, and the nodes of the last prompts",
      function: openPanel,
    },
  ],
  setup() {
    addStyles();
    const wasOpen = sessionStorage.getItem(WAS_OPEN) !== null;
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "pi pi-chart-bar",
      title: "Memory (Snug)",
      tooltip: "Where the memory goes",
      label: "Memory",
      type: "custom",
      render,
      destroy,
    });
    if (wasOpen) openPanel();
  },
  /** The user has pressed R. */
  refreshComboInNodes() {
    const graph = app.rootGraph ?? app.graph;
    if (graph) chooseFirstFiles(graph);
  },
  nodeCreated(node) {
    if (node.comfyClass === "SnugVRAMMonitor") addMonitorWidget(node, queue, client, store);
    if (node.comfyClass === "SnugCompareImages") addCompareWidget(node, app, api);
    if (node.comfyClass === "SnugBlindTest") addBlindWidget(node, app, api);
  },
});
