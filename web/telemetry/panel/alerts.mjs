// @ts-check
/** What deserves attention, each with what to do about it. */

import { alertsOf } from "../alerts.mjs";
import { h, keyed } from "../../dom.mjs";

/** @param {{unload: () => void, focus: (nodeId: string) => void}} actions */
export function makeAlerts(actions) {
  const element = h("ul", { class: "snug-alerts", "data-snug": "alerts", "aria-label": "Warnings" });

  /** @param {Snug.State} state @returns {import("../alerts.mjs").Alert[]} */
  function update(state) {
    const alerts = alertsOf(state);
    keyed(element, alerts, ({ id, text, advice }) => `${id} ${text} ${advice}`, makeAlert);
    element.hidden = !alerts.length;
    return alerts;
  }

  /** @param {import("../alerts.mjs").Alert} alert */
  function makeAlert({ severity, text, advice, action }) {
    return h(
      "li",
      { class: `snug-alert snug-${severity}`, "data-severity": severity },
      h("strong", {}, severity === "error" ? "Error: " : "Warning: "),
      `${text} `,
      h("span", { class: "snug-advice" }, advice),
      action &&
        h("button", { type: "button", class: "snug-button snug-small", onclick: () => run(action) }, action.label),
    );
  }

  /** @param {import("../alerts.mjs").AlertAction} action */
  function run(action) {
    if (action.command === "unload") actions.unload();
    else actions.focus(action.nodeId);
  }
  return { element, update };
}
