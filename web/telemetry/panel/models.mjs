// @ts-check
/** The models that ComfyUI has loaded. */

import { bytes } from "../format.mjs";
import { latest } from "../state.mjs";
import { find, h, keyed, section, set, setText } from "../../dom.mjs";

/** @param {{unload: () => void, focusTitle: (title: string) => void}} actions */
export function makeModels(actions) {
  const list = h("ul", { class: "snug-models", "aria-label": "Loaded models" });
  const none = h("p", { class: "snug-faint" }, "No model is loaded.");
  const element = section("Models", {}, list, none);

  /** @param {Snug.State} state */
  function update(state) {
    const models = latest(state)?.models ?? [];
    const seen = new Map();
    const named = models.map((model) => {
      const name = `${model.name} ${model.device} ${model.total}`;
      seen.set(name, (seen.get(name) ?? 0) + 1);
      return { model, key: `${name} ${seen.get(name)}`, isOne: models.length === 1 };
    });
    keyed(
      list,
      named,
      ({ key }) => key,
      () => makeModel(actions),
      (row, { model, isOne }) => updateModel(row, model, isOne),
    );
    none.hidden = models.length > 0;
  }
  return { element, update };
}

/** @param {{unload: () => void, focusTitle: (title: string) => void}} actions */
function makeModel(actions) {
  const last = h("button", {
    type: "button",
    class: "snug-link",
    onclick: (/** @type {MouseEvent} */ event) => {
      const title = /** @type {HTMLElement} */ (event.currentTarget).dataset.title;
      if (title) actions.focusTitle(title);
    },
  });
  return h(
    "li",
    { class: "snug-model", "data-snug": "model-row" },
    h(
      "div",
      { class: "snug-row" },
      h("strong", { class: "snug-name" }),
      h("span", { class: "snug-formats" }),
      h("button", { type: "button", class: "snug-button snug-small", "data-snug": "unload", onclick: actions.unload }),
    ),
    h("div", { class: "snug-meter", role: "img" }, h("div", { class: "snug-part snug-weights" })),
    h("div", { class: "snug-faint snug-where" }),
    h("div", { class: "snug-faint snug-last" }, "Last used by ", last),
  );
}

/** @param {HTMLElement} row @param {Snug.Model} model @param {boolean} isOne */
function updateModel(row, model, isOne) {
  set(row, {
    "data-name": model.name,
    "data-device": model.device,
    "data-bytes": model.on_device,
    "data-offloaded": model.offloaded,
    "data-pinned": model.pinned,
    "data-total": model.total,
  });
  setText(find(row, ".snug-name"), model.name);
  setText(find(row, ".snug-formats"), model.formats.join(", "));
  const button = find(row, "button[data-snug=unload]");
  setText(button, isOne ? "Unload" : "Unload all");
  set(button, {
    title: "ComfyUI unloads all models together. While a prompt runs, it does so when the prompt has ended.",
    "aria-label": isOne ? `Unload ${model.name}` : `Unload ${model.name} and all other models`,
  });
  const share = model.total > 0 ? (100 * model.on_device) / model.total : 0;
  const meter = find(row, ".snug-meter");
  set(meter, { "aria-label": `${Math.round(share)}% of ${model.name} is on ${model.device}` });
  set(find(meter, ".snug-part"), { style: `width: ${share.toFixed(2)}%` });
  setText(find(row, ".snug-where"), where(model));
  const last = find(row, ".snug-last");
  last.hidden = !model.last_node;
  const link = find(last, "button");
  setText(link, model.last_node ?? "");
  set(link, { "data-title": model.last_node, title: "Show this node" });
}

/** @param {Snug.Model} model */
function where(model) {
  const parts = [`${bytes(model.on_device)} on ${model.device === "cpu" ? "the CPU" : model.device}`];
  if (model.offloaded) parts.push(`${bytes(model.offloaded)} offloaded`);
  if (model.pinned) parts.push(`${bytes(model.pinned)} pinned`);
  return `${parts.join(", ")}; ${bytes(model.total)} in all${model.is_paged ? ", paged by ComfyUI" : ""}`;
}
