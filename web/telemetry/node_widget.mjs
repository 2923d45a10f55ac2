// @ts-check
/** The bar in the VRAM Monitor node: live while a prompt runs, then the peak of the node's report. */

import { bytes, shorten } from "./format.mjs";
import { highest, peakOf, used } from "./layout.mjs";
import { makeBar, updateBar } from "./panel/bar.mjs";
import { h, set, setText } from "../dom.mjs";
import { latest } from "./state.mjs";
import { watchVisible } from "./visible.mjs";

/** Pixels; classic nodes leave the margin around the element. The width has room for the device and its numbers. */
const WIDTH = 280;
const HEIGHT = 72;
const MARGIN = 10;
const LONGEST_NAME = 32;

/** What ComfyUI's own messages tell: every page whether anything runs, and this one when its prompts begin. */
export class Queue {
  isBusy = false;
  /** Prompts of this page that have begun. */
  begun = 0;
  /** @type {Set<() => void>} */ #listeners = new Set();

  /** @param {Comfy.Api} api */
  constructor(api) {
    api.addEventListener("execution_start", () => {
      this.begun += 1;
    });
    api.addEventListener("status", (event) => {
      const isBusy = (event.detail?.exec_info?.queue_remaining ?? 0) > 0;
      if (isBusy === this.isBusy) return;
      this.isBusy = isBusy;
      for (const listener of [...this.#listeners]) listener();
    });
  }

  /** @param {() => void} listener called when that has changed @returns {() => void} ends it */
  subscribe(listener) {
    this.#listeners.add(listener);
    return () => {
      this.#listeners.delete(listener);
    };
  }
}

/**
 * @param {Comfy.Node} node @param {Queue} queue
 * @param {import("./client.mjs").TelemetryClient} client @param {import("./store.mjs").Store} store
 */
export function addMonitorWidget(node, queue, client, store) {
  const heading = h("div", { class: "snug-row" }, h("span", {}), h("span", { class: "snug-use" }));
  const [title, use] = [...heading.children];
  const bar = makeBar();
  const peak = h("div", { class: "snug-faint snug-peak-name" }, "The peak appears here.");
  const element = h(
    "div",
    { class: "snug-node snug-monitor", "data-snug": "monitor", style: `min-height: ${HEIGHT}px` },
    heading,
    bar,
    peak,
  );
  const widget = node.addDOMWidget("snug_memory", "SNUG_MEMORY", element, {
    serialize: false, // not an input of the node
    hideOnZoom: true,
    getMinHeight: () => HEIGHT + 2 * MARGIN,
    getMaxHeight: () => HEIGHT + 2 * MARGIN,
  });
  widget.serialize = false; // nor a value in the saved workflow
  // The classic page does not make room for it in a new node; a saved one gets its own size afterwards.
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, WIDTH), height]);

  /** @type {(() => void) | undefined} */ let release;
  /** @type {(() => void) | undefined} */ let unsubscribe;
  let frame = 0;
  /** Of the prompt of this number the node has reported its peak, which later nodes do not change. */
  let reported = -1;

  function draw() {
    frame = 0;
    const { state } = store;
    const device = latest(state)?.devices[0];
    if (!device || state.connection !== "live") return;
    setText(title, device.title);
    setText(use, `${bytes(used(device))} of ${bytes(device.total)}`);
    updateBar(bar, device);
    if (state.running && reported !== queue.begun) showPeak(state.running);
  }

  /** @param {Snug.Prompt} prompt */
  function showPeak(prompt) {
    const found = highest(prompt.nodes, prompt.device);
    if (found) tell(peakOf(found, prompt.device), found.title, " so far");
  }

  /** @param {number} size @param {string | null} name @param {string} suffix */
  function tell(size, name, suffix) {
    set(element, { "data-bytes": size });
    set(peak, { title: name });
    setText(peak, `Peak${suffix} ${bytes(size)}${name ? `: ${shorten(name, LONGEST_NAME)}` : ""}`);
  }

  function drawSoon() {
    if (!frame) frame = requestAnimationFrame(draw);
  }

  /** A lease only while a prompt runs; with the panel open there are samples anyway. */
  function follow() {
    if (unsubscribe && queue.isBusy) release ??= client.watch();
    else {
      release?.();
      release = undefined;
    }
  }

  /** @param {boolean} isVisible */
  function onVisible(isVisible) {
    unsubscribe?.();
    unsubscribe = undefined;
    if (isVisible) {
      unsubscribe = store.subscribe(drawSoon);
      drawSoon();
    }
    follow();
  }

  const stopVisible = watchVisible(element, onVisible);
  const stopQueue = queue.subscribe(follow);

  const { onExecuted, onRemoved } = node;
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    /** @type {Snug.MonitorPeak | undefined} */
    const report = output?.snug_memory?.[0];
    if (!report) return;
    reported = queue.begun;
    tell(report.peak_bytes, report.node, "");
  };
  node.onRemoved = function () {
    onRemoved?.call(this);
    stopQueue();
    stopVisible();
  };
}
