// @ts-check
/** The page of a Compare Images node: pictures, buttons, and what stays in the workflow. */

import { h, setText } from "../dom.mjs";
import { watchVisible } from "../telemetry/visible.mjs";
import { addStageWidget, keepKeys, saveSoon } from "./node_element.mjs";
import { urlOf } from "./pictures.mjs";
import { Stage } from "./stage.mjs";
import { INITIAL, MODES, fitted, isComparison, kept, reduce, restored } from "./state.mjs";
import { makeToolbar } from "./toolbar.mjs";

/** Of the node's properties, which are saved with the workflow. */
const PROPERTY = "snug_compare";
const KEYS = "G S B D choose the mode, page up and down step through a batch";
const EMPTY = "Run the workflow to see the images here.";
const GONE = "The images are no longer on the server: run the workflow again.";

/** @param {Comfy.Node} node @param {Comfy.App} app @param {Comfy.Api} api */
export function addCompareWidget(node, app, api) {
  /** @type {Snug.Comparison | undefined} */ let shown;
  /** @type {import("./state.mjs").State} */ let state = INITIAL;
  /** @type {ReturnType<typeof setInterval> | undefined} */ let timer;
  let isVisible = false;
  const wantsStillness = matchMedia("(prefers-reduced-motion: reduce)");
  let isPlaying = !wantsStillness.matches;

  const stage = new Stage(dispatch, (file) => urlOf(api, file), { key, missing, tell, keys: KEYS });
  const toolbar = makeToolbar(dispatch, { play });
  const message = h("p", { class: "snug-faint snug-message" }, EMPTY);
  const told = h("p", { class: "snug-told", role: "status", "data-snug": "told" });
  const notes = h("div", { class: "snug-notes snug-problem", hidden: "" });
  const element = h(
    "div",
    { class: "snug-node snug-compare widget-expands", "data-snug": "compare" },
    message,
    toolbar.element,
    stage.element,
    told,
    notes,
  );
  keepKeys(element);
  addStageWidget(node, "snug_compare", element);
  hideParts();

  /** @param {import("./state.mjs").Action} action */
  function dispatch(action) {
    if (!shown) return;
    const before = state;
    state = reduce(state, action, shown);
    if (action.type === "mode" && action.mode === "blink") stage.showSecond(false);
    draw();
    if (JSON.stringify(kept(before)) !== JSON.stringify(kept(state))) keep();
  }

  function draw() {
    if (!shown) return;
    toolbar.update(shown, state, isPlaying);
    stage.update(shown, state);
    blink();
  }

  /** Starts anew with each change, so that a chosen picture is seen for the whole time. */
  function blink() {
    clearInterval(timer);
    timer = undefined;
    if (shown && isVisible && isPlaying && state.mode === "blink") {
      timer = setInterval(() => stage.showSecond(!stage.secondIsUp), 1000 * state.interval);
    }
  }

  function play() {
    isPlaying = !isPlaying;
    draw();
  }

  /** @param {string} pressed @returns {boolean} */
  function key(pressed) {
    const mode = MODES.find((name) => name[0] === pressed.toLowerCase());
    if (mode) dispatch({ type: "mode", mode });
    else if (pressed === "PageUp") dispatch({ type: "step", by: -1 });
    else if (pressed === "PageDown") dispatch({ type: "step", by: 1 });
    else if (pressed === " " && state.mode === "blink") {
      isPlaying = false;
      stage.showSecond(!stage.secondIsUp);
      draw();
    } else return false;
    return true;
  }

  /** @param {string} text */
  function tell(text) {
    setText(told, text);
    told.hidden = !text;
  }

  function missing() {
    setText(message, GONE);
    shown = undefined;
    hideParts();
    blink();
  }

  function hideParts() {
    message.hidden = shown !== undefined;
    for (const part of [toolbar.element, stage.element]) part.hidden = !shown;
    if (shown) return;
    told.hidden = notes.hidden = true;
  }

  /** @param {Snug.Comparison} comparison */
  function show(comparison) {
    shown = comparison;
    state = fitted(state, comparison);
    setText(notes, comparison.notes.join(" "));
    hideParts();
    notes.hidden = !comparison.notes.length;
    draw();
  }

  function keep() {
    node.properties[PROPERTY] = { shown, chosen: kept(state) };
    saveSoon(app);
  }

  function restore() {
    const saved = node.properties[PROPERTY];
    state = restored(saved?.chosen);
    if (isComparison(saved?.shown)) show(saved.shown);
  }

  const stopVisible = watchVisible(element, (isSeen) => {
    isVisible = isSeen;
    blink();
  });
  const { onExecuted, onConfigure, onRemoved } = node;
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    const found = output?.snug_compare?.[0];
    if (!isComparison(found)) return;
    show(found);
    keep();
  };
  node.onConfigure = function (data) {
    onConfigure?.call(this, data);
    restore();
  };
  node.onRemoved = function () {
    onRemoved?.call(this);
    clearInterval(timer);
    stopVisible();
  };
}
