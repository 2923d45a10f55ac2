// @ts-check
/** The buttons of a comparison. */

import { freshId, h, keyed, set, setText } from "../dom.mjs";
import { gradient } from "./difference.mjs";
import { ZOOM_STEP } from "./geometry.mjs";
import { LARGEST_GAIN, LONGEST_INTERVAL, MODES, SHORTEST_INTERVAL } from "./state.mjs";
import { nameOf, zoomText } from "./wording.mjs";

/** @type {Record<import("./state.mjs").Mode, [string, string]>} */
const NAMES = {
  grid: ["Grid", "All images side by side (G)"],
  slider: ["Slider", "Two images, one on each side of a boundary that you move (S)"],
  blink: ["Blink", "Two images in turns at the same place (B)"],
  difference: ["Difference", "How much two images differ, pixel by pixel (D)"],
};

/**
 * @param {(action: import("./state.mjs").Action) => void} dispatch
 * @param {{play: () => void}} actions play: starts and stops blinking
 * @param {readonly import("./state.mjs").Mode[]} [offered] others than all: of two pictures that stay where they are
 */
export function makeToolbar(dispatch, actions, offered = MODES) {
  const modes = offered.map((mode) => {
    const [name, title] = NAMES[mode];
    const element = act(name, title, { type: "mode", mode });
    set(element, { "data-mode": mode });
    return element;
  });
  const first = makeChoice("First image", (picture) => dispatch({ type: "first", picture }));
  const second = makeChoice("Second image", (picture) => dispatch({ type: "second", picture }));
  const swap = act("⇄", "Swap the two images", { type: "swap" });
  const pair = h("div", { class: "snug-tools" }, first, swap, second);

  // Where pictures stay where they are, nothing blinks by itself.
  const isByHand = offered !== MODES;
  const title = isByHand ? "Show the other image (space)" : "Start or stop blinking; space shows the other image";
  const play = h("button", { ...button(title), onclick: actions.play });
  const interval = makeRange("Seconds", SHORTEST_INTERVAL, LONGEST_INTERVAL, 0.1, (seconds) =>
    dispatch({ type: "interval", seconds }),
  );
  const blink = h("div", { class: "snug-tools" }, play, interval.element);
  const gain = makeRange("Gain", 0, Math.log2(LARGEST_GAIN), 1, (power) =>
    dispatch({ type: "gain", gain: 2 ** power }),
  );
  const legend = h(
    "div",
    { class: "snug-scale" },
    h("span", {}, "0"),
    h("i", { style: `background: ${gradient()}` }),
    h("span", {}),
  );
  const difference = h("div", { class: "snug-tools" }, gain.element, legend);

  const place = h("span", { class: "snug-count" });
  const back = act("◀", "Back in the batch (page up)", { type: "step", by: -1 });
  const next = act("▶", "On in the batch (page down)", { type: "step", by: 1 });
  const batch = h("div", { class: "snug-tools" }, back, place, next);
  const zoom = h("span", { class: "snug-count" });
  const zooming = h(
    "div",
    { class: "snug-tools" },
    act("−", "Smaller (−, or the wheel after a click on the image)", { type: "zoom", factor: 1 / ZOOM_STEP }),
    zoom,
    act("+", "Larger (+, or the wheel after a click on the image)", { type: "zoom", factor: ZOOM_STEP }),
    act("Fit", "Show all of the image (0, or a double click)", { type: "whole" }),
  );
  const element = h(
    "div",
    { class: "snug-toolbar", role: "toolbar", "aria-label": "Compare images" },
    h("div", { class: "snug-tools", role: "group", "aria-label": "Mode" }, ...modes),
    batch,
    zooming,
    pair,
    blink,
    difference,
  );

  /** @param {string} text @param {string} title @param {import("./state.mjs").Action} action */
  function act(text, title, action) {
    return h("button", { ...button(title), onclick: () => dispatch(action) }, text);
  }

  /** @param {Snug.Comparison} shown @param {import("./state.mjs").State} state @param {boolean} isPlaying */
  function update(shown, state, isPlaying) {
    for (const mode of modes) set(mode, { "aria-pressed": String(mode.dataset.mode === state.mode) });
    pair.hidden = state.mode === "grid" || isByHand;
    interval.element.hidden = isByHand;
    blink.hidden = state.mode !== "blink";
    difference.hidden = state.mode !== "difference";
    batch.hidden = shown.count < 2;
    fillChoice(first, shown, state.first);
    fillChoice(second, shown, state.second);
    setText(play, isByHand ? "Other image" : isPlaying ? "Pause" : "Play");
    interval.set(state.interval, `${state.interval.toFixed(1)} s`);
    gain.set(Math.log2(state.gain), `${state.gain}×`);
    setText(legend.children[2], `${(100 / state.gain).toFixed(state.gain > 8 ? 1 : 0)}%`);
    setText(place, `${state.index + 1} of ${shown.count}`);
    setText(zoom, zoomText(state.view.zoom));
  }

  return { element, update };
}

/** @param {string} title */
function button(title) {
  return { type: "button", class: "snug-button snug-small", title, "aria-label": title.replace(/ \(.*\)$/, "") };
}

/** @param {string} label @param {(picture: number) => void} choose */
function makeChoice(label, choose) {
  const element = h("select", { class: "snug-input snug-small", "aria-label": label, title: label });
  element.addEventListener("change", () => choose(element.selectedIndex));
  return element;
}

/** @param {HTMLSelectElement} element @param {Snug.Comparison} shown @param {number} chosen */
function fillChoice(element, shown, chosen) {
  keyed(
    element,
    shown.pictures.map(nameOf),
    (name) => name,
    (name) => h("option", {}, name),
  );
  if (element.selectedIndex !== chosen) element.selectedIndex = chosen;
}

/**
 * @param {string} label @param {number} min @param {number} max @param {number} step
 * @param {(value: number) => void} change
 */
function makeRange(label, min, max, step, change) {
  const id = freshId("range");
  const input = h("input", { type: "range", id, min, max, step });
  const reading = h("output", { class: "snug-count", for: id });
  input.addEventListener("input", () => change(input.valueAsNumber));
  const element = h("label", { class: "snug-range", for: id }, label, input, reading);
  return {
    element,
    /** @param {number} value @param {string} text */
    set(value, text) {
      if (input.valueAsNumber !== value) input.value = String(value);
      set(input, { "aria-valuetext": text });
      setText(reading, text);
    },
  };
}
