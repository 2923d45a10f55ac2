// @ts-check
/** The panel in the sidebar: puts its parts together and keeps them up to date while it can be seen. */

import { messageOf } from "../../request.mjs";
import { bytes } from "../format.mjs";
import { focusNode } from "../graph.mjs";
import { highest, peakOf } from "../layout.mjs";
import { toast } from "../toast.mjs";
import { watchVisible } from "../visible.mjs";
import { makeAlerts } from "./alerts.mjs";
import { makeDevices } from "./devices.mjs";
import { h, set, setText } from "../../dom.mjs";
import { makeDiagnostics, makeExport } from "./files.mjs";
import { makeForecast } from "./forecast.mjs";
import { makeInspector } from "./inspector.mjs";
import { makeModels } from "./models.mjs";
import { makePrompts } from "./prompts.mjs";

const CONNECTIONS = {
  off: "",
  connecting: "Connecting…",
  live: "Live",
  waiting: "Waiting",
  unavailable: "Not available",
};

/**
 * @param {HTMLElement} container emptied first
 * @param {Comfy.App} app
 * @param {import("../client.mjs").TelemetryClient} client
 * @param {import("../store.mjs").Store} store
 * @returns {() => void} takes the panel away; may be called again
 */
export function mountPanel(container, app, client, store) {
  /** @type {Snug.Prompt | undefined} */
  let prompt;
  /** @type {string | null | undefined} of the last prompt that has ended; undefined before the history is there */
  let announced;
  /** @type {(() => void) | undefined} */
  let stopWatching;
  let frame = 0;

  const actions = {
    unload,
    focus,
    focusTitle: (/** @type {string} */ title) => focus(title.slice(title.lastIndexOf("#") + 1)),
  };
  const status = h("span", { class: "snug-status" });
  const problem = h("p", { class: "snug-problem", hidden: "" });
  const spoken = h("div", { class: "snug-unseen", role: "status", "aria-live": "polite" });
  const alerts = makeAlerts(actions);
  const devices = makeDevices();
  const models = makeModels(actions);
  const exporter = makeExport(app, client, () => ({ state: store.state, prompt }));
  const prompts = makePrompts(actions, exporter.element);
  const forecast = makeForecast(app, client);
  const panel = h(
    "section",
    { class: "snug-panel", "data-snug": "panel", "aria-label": "Memory (Snug)" },
    h("header", { class: "snug-row snug-head" }, h("h2", {}, "Memory"), status),
    problem,
    spoken,
    alerts.element,
    devices.element,
    models.element,
    forecast.element,
    prompts.element,
    makeInspector(app, client).element,
    h("footer", { class: "snug-buttons" }, makeDiagnostics(app, client).element),
  );

  function draw() {
    frame = 0;
    const { state } = store;
    setText(status, CONNECTIONS[state.connection]);
    set(panel, { "data-connection": state.connection });
    problem.hidden = !state.problem;
    if (problem.textContent !== state.problem) {
      setText(problem, state.problem);
      if (state.problem) say(state.problem);
    }
    alerts.update(state);
    devices.update(state);
    models.update(state);
    forecast.update(state);
    prompt = prompts.update(state);
    exporter.update(prompt);
    announce(state);
  }

  /** Says when a prompt has ended, and nothing of what changes several times a second. @param {Snug.State} state */
  function announce(state) {
    if (state.connection !== "live" || !state.samples.length) return;
    const last = state.prompts[state.prompts.length - 1];
    const isNews = announced !== undefined && last && last.prompt_id !== announced;
    announced = last?.prompt_id ?? null;
    const node = last && highest(last.nodes, last.device);
    if (isNews && node) say(`The prompt has ended. Its peak was ${bytes(peakOf(node, last.device))} in ${node.title}.`);
  }

  /** @param {string} text */
  function say(text) {
    setText(spoken, text);
  }

  function drawSoon() {
    if (stopWatching && !frame) frame = requestAnimationFrame(draw);
  }

  /** @param {boolean} isVisible */
  function onVisible(isVisible) {
    if (isVisible && !stopWatching) {
      const release = client.watch();
      const unsubscribe = store.subscribe(drawSoon);
      stopWatching = () => {
        unsubscribe();
        release();
      };
      drawSoon();
    } else if (!isVisible) {
      stopWatching?.();
      stopWatching = undefined;
      cancelAnimationFrame(frame);
      frame = 0;
    }
  }

  async function unload() {
    const when = store.state.running
      ? "They are unloaded when the running prompt has ended."
      : "ComfyUI unloads its models.";
    try {
      await client.post("/free", { unload_models: true });
      toast(app, "info", "Unloading", when);
      client.refresh();
    } catch (error) {
      toast(app, "error", "Nothing was unloaded", messageOf(error));
    }
  }

  /** @param {string} nodeId */
  async function focus(nodeId) {
    if (!(await focusNode(app, nodeId))) {
      toast(app, "warn", "The node is not in this workflow", `No node here has the id ${nodeId}.`);
    }
  }

  container.replaceChildren(panel);
  const resizing = new ResizeObserver(() => prompts.resize());
  resizing.observe(panel);
  const stopVisible = watchVisible(panel, onVisible);
  return () => {
    stopVisible();
    resizing.disconnect();
    panel.remove();
  };
}
