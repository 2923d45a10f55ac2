// @ts-check
/** What a Compare Images node shows. Pure. */

import { WHOLE, clamp, moved, zoomed } from "./geometry.mjs";

/** @typedef {"grid" | "slider" | "blink" | "difference"} Mode */
/** @type {readonly Mode[]} */
export const MODES = ["grid", "slider", "blink", "difference"];
/** Seconds between the pictures: faster blinking can harm people (three flashes a second are too many). */
export const SHORTEST_INTERVAL = 0.4;
export const LONGEST_INTERVAL = 3;
export const LARGEST_GAIN = 64;

/**
 * first, second: numbers of the pictures that all modes but the grid show. index: place in the batch. split: share of
 * the width that the slider gives to the first. interval: seconds of a blink. gain: factor of the difference.
 * @typedef {{mode: Mode, first: number, second: number, index: number, split: number, interval: number, gain: number,
 *   view: import("./geometry.mjs").View}} State
 * @typedef {{type: "mode", mode: Mode} | {type: "first" | "second", picture: number} | {type: "step", by: number} |
 *   {type: "split", split: number} | {type: "interval", seconds: number} | {type: "gain", gain: number} |
 *   {type: "zoom", factor: number, point?: {x: number, y: number}} | {type: "move", right: number, down: number} |
 *   {type: "whole"} | {type: "swap"}} Action
 */

/** @type {State} */
export const INITIAL = Object.freeze({
  mode: "grid",
  first: 0,
  second: 1,
  index: 0,
  split: 0.5,
  interval: 0.8,
  gain: 8,
  view: WHOLE,
});

/** @param {State} state @param {Action} action @param {Snug.Comparison} shown @returns {State} */
export function reduce(state, action, shown) {
  const last = shown.pictures.length - 1;
  switch (action.type) {
    case "mode":
      return { ...state, mode: action.mode };
    case "first":
    case "second":
      return { ...state, [action.type]: clamp(action.picture, 0, last) };
    case "swap":
      return { ...state, first: state.second, second: state.first };
    case "step":
      return { ...state, index: (state.index + action.by + shown.count) % shown.count };
    case "split":
      return { ...state, split: clamp(action.split, 0, 1) };
    case "interval":
      return { ...state, interval: clamp(action.seconds, SHORTEST_INTERVAL, LONGEST_INTERVAL) };
    case "gain":
      return { ...state, gain: clamp(action.gain, 1, LARGEST_GAIN) };
    case "zoom":
      return { ...state, view: zoomed(state.view, action.factor, action.point) };
    case "move":
      return { ...state, view: moved(state.view, action.right, action.down) };
    case "whole":
      return { ...state, view: WHOLE };
  }
}

/**
 * For other pictures: what was chosen stays, as far as there is such a picture.
 * @param {State} state @param {Snug.Comparison} shown @returns {State}
 */
export function fitted(state, shown) {
  const last = shown.pictures.length - 1;
  const chosen = state.first <= last && state.second <= last ? {} : { first: 0, second: Math.min(1, last) };
  return { ...state, ...chosen, index: Math.min(state.index, shown.count - 1) };
}

/** What is kept in the workflow: where one looks at is not. @param {State} state */
export function kept({ mode, first, second, interval, gain }) {
  return { mode, first, second, interval, gain };
}

/** From a workflow, which anybody may have written. @param {any} value @returns {State} */
export function restored(value) {
  const state = { ...INITIAL };
  if (typeof value !== "object" || value === null) return state;
  if (MODES.includes(value.mode)) state.mode = value.mode;
  if (isIndex(value.first)) state.first = value.first;
  if (isIndex(value.second)) state.second = value.second;
  if (isNumber(value.interval)) state.interval = clamp(value.interval, SHORTEST_INTERVAL, LONGEST_INTERVAL);
  if (isNumber(value.gain)) state.gain = clamp(value.gain, 1, LARGEST_GAIN);
  return state;
}

/** Whether a value is what the server sends. @param {any} value @returns {value is Snug.Comparison} */
export function isComparison(value) {
  return (
    isIndex(value?.count) &&
    value.count > 0 &&
    Array.isArray(value.notes) &&
    Array.isArray(value.pictures) &&
    value.pictures.length > 0 &&
    value.pictures.every(
      (/** @type {any} */ picture) =>
        typeof picture?.caption === "string" &&
        picture.width > 0 &&
        picture.height > 0 &&
        Array.isArray(picture.scores) &&
        Array.isArray(picture.files) &&
        picture.files.length > 0 &&
        picture.files.every(isFile),
    )
  );
}

/** @param {any} value @returns {value is Snug.PictureFile} */
export function isFile(value) {
  return typeof value?.filename === "string" && typeof value.subfolder === "string" && value.type === "temp";
}

/** @param {unknown} value */
function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** @param {unknown} value */
function isIndex(value) {
  return Number.isInteger(value) && Number(value) >= 0;
}
