// @ts-check
/** What a model file is made of and whether it fits, from its header. */

import { messageOf } from "../../request.mjs";
import { toast } from "../toast.mjs";
import { copyText } from "./files.mjs";
import { h, section, setText } from "../../dom.mjs";
import { drawInspection } from "./inspection.mjs";

/** @param {Comfy.App} app @param {import("../client.mjs").TelemetryClient} client */
export function makeInspector(app, client) {
  const choice = h("select", { class: "snug-input snug-wide", "aria-label": "File to inspect", "data-input": "file" });
  const [width, height, batch] = [
    number("Width", 1024, 16, 16384, "pixels of the image, for the estimate"),
    number("Height", 1024, 16, 16384, "pixels of the image, for the estimate"),
    number("Batch", 1, 1, 4096, "images at once, for the estimate"),
  ];
  const inspect = h("button", { type: "submit", class: "snug-button" }, "Inspect");
  const form = h(
    "form",
    { class: "snug-form", onsubmit: onSubmit },
    choice,
    h("div", { class: "snug-buttons" }, width.element, height.element, batch.element, inspect),
  );
  const problem = h("p", { class: "snug-warning", role: "alert", hidden: "" });
  const picture = h("div", { class: "snug-inspection" });
  const report = h("pre", { class: "snug-report", tabindex: "0", "aria-label": "Report" });
  const copy = h("button", { type: "button", class: "snug-button snug-small", onclick: onCopy }, "Copy report");
  const text = h("details", {}, h("summary", {}, "Full report"), report, copy);
  const result = h("div", { hidden: "", "aria-live": "polite" }, picture, text);
  const element = section(
    "Inspect a model file",
    { "data-snug": "inspector", ontoggle: onToggle },
    form,
    problem,
    result,
  );
  element.open = false;
  let isListed = false;

  function onToggle() {
    if (element.open && !isListed) list();
  }

  async function list() {
    isListed = true;
    try {
      const { files } = await client.get("/snug/inspect/files");
      fill(files);
    } catch (error) {
      isListed = false;
      tell(messageOf(error));
    }
  }

  /** @param {Snug.FileChoice[]} files */
  function fill(files) {
    const folders = [...new Set(files.map(({ folder }) => folder))];
    choice.replaceChildren(
      ...folders.map((folder) =>
        h(
          "optgroup",
          { label: folder },
          ...files
            .filter((file) => file.folder === folder)
            .map(({ name }) => h("option", { value: `${folder}/${name}` }, name)),
        ),
      ),
    );
    inspect.disabled = !files.length;
    tell(files.length ? "" : "There are no model files in ComfyUI's folders yet.");
  }

  /** @param {SubmitEvent} event */
  async function onSubmit(event) {
    event.preventDefault();
    const at = choice.value.indexOf("/");
    if (at < 0) return;
    inspect.disabled = true;
    setText(inspect, "Reading…");
    element.setAttribute("aria-busy", "true");
    try {
      /** @type {Snug.Inspection} */
      const found = await client.post("/snug/inspect", {
        folder: choice.value.slice(0, at),
        name: choice.value.slice(at + 1),
        width: width.value(),
        height: height.value(),
        batch_size: batch.value(),
      });
      tell("");
      picture.replaceChildren(...drawInspection(found));
      setText(report, found.text);
      result.hidden = false;
    } catch (error) {
      tell(messageOf(error));
      result.hidden = true;
    } finally {
      inspect.disabled = false;
      setText(inspect, "Inspect");
      element.removeAttribute("aria-busy");
    }
  }

  async function onCopy() {
    try {
      await copyText(report.textContent ?? "");
      toast(app, "success", "Report copied");
    } catch (error) {
      toast(app, "error", "Nothing was copied", messageOf(error));
    }
  }

  /** @param {string} sentence empty when all is well */
  function tell(sentence) {
    setText(problem, sentence);
    problem.hidden = !sentence;
  }
  return { element };
}

/** @param {string} name @param {number} value @param {number} min @param {number} max @param {string} help */
function number(name, value, min, max, help) {
  const input = h("input", {
    type: "number",
    class: "snug-input",
    value,
    min,
    max,
    step: 1,
    required: "",
    "data-input": name.toLowerCase(),
  });
  const element = h("label", { class: "snug-field", title: `${name}: ${help}` }, `${name} `, input);
  return { element, value: () => Math.round(input.valueAsNumber) };
}
