// @ts-check
/** A stacked bar of what takes a device's memory. */

import { bytes, percent } from "../format.mjs";
import { partHelp, partName, segments, used } from "../layout.mjs";
import { h, keyed, set, setText } from "../../dom.mjs";

/** Parts of a bar that are smaller than this get no label in it. */
const LABELLED = 0.16;

export function makeBar() {
  return h("div", { class: "snug-bar", role: "img" });
}

/** @param {HTMLElement} bar @param {Snug.Device} device */
export function updateBar(bar, device) {
  const parts = segments(device);
  set(bar, { "aria-label": describe(device), "data-total": device.total });
  keyed(
    bar,
    parts,
    ({ part }) => part,
    ({ part }) => h("div", { class: `snug-part snug-${part}`, "data-part": part }, h("span", {})),
    (/** @type {HTMLElement} */ element, { part, bytes: size, share }) => {
      const grow = `flex-grow: ${share.toFixed(5)}`;
      const name = partName(part, device.is_gpu);
      set(element, {
        style: grow,
        "data-bytes": size,
        title: `${name}: ${bytes(size)} (${percent(size, device.total)})\n${partHelp(part, device.is_gpu)}`,
      });
      setText(/** @type {Node} */ (element.firstChild), share >= LABELLED && part !== "free" ? bytes(size) : "");
    },
  );
}

/** @param {Snug.Device} device @returns {string} for a screen reader */
export function describe(device) {
  const parts = segments(device).map(({ part, bytes: size }) => `${partName(part, device.is_gpu)} ${bytes(size)}`);
  return `${device.title}: ComfyUI uses ${bytes(used(device))} of ${bytes(device.total)}; ${parts.join(", ")}`;
}
