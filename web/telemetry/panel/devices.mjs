// @ts-check
/** The devices: a bar for each, and what its parts are. */

import { bytes, percent } from "../format.mjs";
import { partHelp, partName, segments, used } from "../layout.mjs";
import { latest } from "../state.mjs";
import { makeBar, updateBar } from "./bar.mjs";
import { find, h, keyed, section, set, setText } from "../../dom.mjs";

export function makeDevices() {
  const list = h("div", { class: "snug-devices" });
  const element = section("Devices", {}, list);

  /** @param {Snug.State} state */
  function update(state) {
    keyed(list, latest(state)?.devices ?? [], ({ name }) => name, makeDevice, updateDevice);
  }
  return { element, update };
}

/** @param {Snug.Device} device */
function makeDevice(device) {
  return h(
    "div",
    { class: "snug-device", "data-snug": "device-bar", "data-device": device.name },
    h("div", { class: "snug-row" }, h("strong", { class: "snug-name" }), h("span", { class: "snug-use" })),
    makeBar(),
    h("ul", { class: "snug-legend" }),
  );
}

/** @param {HTMLElement} element @param {Snug.Device} device */
function updateDevice(element, device) {
  const busy = used(device);
  set(element, { "data-bytes": busy, "data-total": device.total });
  const isNamed = device.title !== device.name && device.is_gpu;
  setText(find(element, ".snug-name"), isNamed ? `${device.title} (${device.name})` : device.title);
  setText(find(element, ".snug-use"), `${bytes(busy)} of ${bytes(device.total)} used (${percent(busy, device.total)})`);
  updateBar(find(element, ".snug-bar"), device);
  keyed(
    find(element, ".snug-legend"),
    segments(device),
    ({ part }) => part,
    ({ part }) =>
      h(
        "li",
        { title: partHelp(part, device.is_gpu) },
        h("span", { class: `snug-swatch snug-${part}`, "aria-hidden": "true" }),
        `${partName(part, device.is_gpu)} `,
        h("b", {}),
      ),
    (/** @type {HTMLElement} */ item, { bytes: size }) => {
      set(item, { "data-bytes": size });
      setText(find(item, "b"), bytes(size));
    },
  );
}
