// @ts-check
/** The report of a model file as a picture: formats, blocks, tensors, and whether it fits. */

import { bytes, percent, plural } from "../format.mjs";
import { h } from "../../dom.mjs";

/** Blocks and tensors that are named. */
const MOST_GROUPS = 8;
const MOST_NAMES = 5;

/** @param {Snug.Inspection} found @returns {HTMLElement[]} */
export function drawInspection(found) {
  return [
    h("p", {}, h("strong", { class: "snug-name" }, found.architecture ?? "unknown architecture"), ` ${sizeOf(found)}`),
    ...(found.fit ? [verdict(found.fit)] : []),
    h("h4", {}, "Formats"),
    list(found.formats.map((use) => formatRow(use, found))),
    h("h4", {}, "Blocks"),
    list(found.groups.slice(0, MOST_GROUPS).map((group) => groupRow(group, found.bytes))),
    ...tensors(found),
  ];
}

/** @param {Snug.Inspection} found */
function sizeOf(found) {
  return `${count(found.parameters)} parameters in ${bytes(found.bytes)}`;
}

/** @param {number} number */
function count(number) {
  if (number >= 1e9) return `${(number / 1e9).toFixed(1)} B`;
  return number >= 1e6 ? `${(number / 1e6).toFixed(1)} M` : String(number);
}

/** @param {NonNullable<Snug.Inspection["fit"]>} fit */
function verdict(fit) {
  const sign = fit.offloaded > 0 ? "⚠" : "✓";
  const kind = fit.offloaded > 0 ? "snug-verdict snug-warning" : "snug-verdict";
  return h(
    "p",
    { class: kind, "data-bytes": fit.weights },
    `${sign} ${fit.verdict}${fit.streaming ? ` ${fit.streaming}` : ""}`,
  );
}

/** @param {Element[]} rows */
function list(rows) {
  return h("ul", { class: "snug-files" }, ...rows);
}

/** @param {Snug.Inspection["formats"][number]} use @param {Snug.Inspection} found */
function formatRow(use, found) {
  const reasons = found.choices.filter(({ format }) => format === use.format).map(({ reason }) => reason);
  return row(
    use.format,
    `${plural(use.tensors, "tensor")}, ${use.bits_per_weight.toFixed(1)} bits`,
    use.nbytes,
    found.bytes,
    [`${use.bits_per_weight.toFixed(2)} bits per weight`, ...reasons].join("\n"),
  );
}

/** @param {Snug.Inspection["groups"][number]} group @param {number} whole */
function groupRow(group, whole) {
  const blocks = Object.keys(group.blocks).length;
  return row(
    group.name,
    blocks > 1 ? plural(blocks, "block") : plural(group.tensors, "tensor"),
    group.bytes,
    whole,
    "",
  );
}

/** @param {string} name @param {string} about @param {number} size @param {number} whole @param {string} help */
function row(name, about, size, whole, help) {
  const width = whole > 0 ? (100 * size) / whole : 0;
  return h(
    "li",
    { title: help || null, "data-name": name, "data-bytes": size },
    h(
      "div",
      { class: "snug-row" },
      h("b", { class: "snug-name" }, name),
      h("span", { class: "snug-faint snug-about" }, about),
      h("span", {}, `${bytes(size)} (${percent(size, whole)})`),
    ),
    h(
      "div",
      { class: "snug-meter", "aria-hidden": "true" },
      h("div", { class: "snug-weights", style: `width: ${width.toFixed(1)}%` }),
    ),
  );
}

/** @param {Snug.Inspection} found */
function tensors({ match, no_match, notes }) {
  const texts = [...notes];
  if (match) {
    texts.unshift(`ComfyUI builds ${match.model} of it.`);
    if (match.missing.length) texts.push(`Missing: ${names(match.missing)}`);
    if (match.unexpected.length) texts.push(`Unexpected: ${names(match.unexpected)}`);
  } else if (no_match) texts.unshift(`Not compared with a model: ${no_match}`);
  return texts.map((text) =>
    h("p", { class: /^(Missing|Unexpected)/.test(text) ? "snug-warning" : "snug-faint" }, text),
  );
}

/** @param {string[]} all */
function names(all) {
  const shown = all.slice(0, MOST_NAMES).join(", ");
  return all.length > MOST_NAMES ? `${shown} and ${all.length - MOST_NAMES} more` : shown;
}
