// @ts-check
/** Export of the prompt that is shown, and the copy of diagnostics. */

import { RequestError, messageOf } from "../../request.mjs";
import { asCsv, asJson } from "../export.mjs";
import { latest } from "../state.mjs";
import { toast } from "../toast.mjs";
import { h } from "../../dom.mjs";

/**
 * @param {Comfy.App} app @param {import("../client.mjs").TelemetryClient} client
 * @param {() => {state: Snug.State, prompt: Snug.Prompt | undefined}} current
 */
export function makeExport(app, client, current) {
  const format = h(
    "select",
    {
      class: "snug-input",
      "aria-label": "Format of the file",
      title: "CSV has a line for each node, JSON the timeline as well.",
    },
    h("option", { value: "csv" }, "CSV"),
    h("option", { value: "json" }, "JSON"),
  );
  const save = h(
    "button",
    {
      type: "button",
      class: "snug-button",
      "data-action": "save",
      title: "Writes the file below ComfyUI's output folder",
      onclick: onSave,
    },
    "Save",
  );
  const download = h(
    "button",
    {
      type: "button",
      class: "snug-button",
      "data-action": "download",
      title: "Downloads the file to this computer",
      onclick: onDownload,
    },
    "Download",
  );
  const element = h(
    "div",
    { class: "snug-buttons", "data-snug": "export" },
    h("span", {}, "Export"),
    format,
    save,
    download,
  );

  async function onSave() {
    const { prompt } = current();
    if (!prompt) return;
    try {
      const body = { format: format.value, prompt_id: prompt.prompt_id };
      const { path } = await client.post("/snug/telemetry/export", body);
      element.dataset.path = path;
      toast(app, "success", "Saved", `${path}, below ComfyUI's output folder`);
    } catch (error) {
      if (error instanceof RequestError && error.isMissing) onDownload();
      else toast(app, "error", "Not saved", messageOf(error));
    }
  }

  function onDownload() {
    const { state, prompt } = current();
    if (!prompt) return;
    const isCsv = format.value === "csv";
    const text = isCsv ? asCsv(prompt) : asJson(prompt, latest(state));
    const url = URL.createObjectURL(new Blob([text], { type: isCsv ? "text/csv" : "application/json" }));
    const link = h("a", { href: url, download: `snug-memory-${prompt.prompt_id.slice(0, 8)}.${format.value}` });
    link.click();
    // The browser has begun with it by then.
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  /** @param {Snug.Prompt | undefined} prompt */
  function update(prompt) {
    element.hidden = !prompt;
  }
  return { element, update };
}

/** @param {Comfy.App} app @param {import("../client.mjs").TelemetryClient} client */
export function makeDiagnostics(app, client) {
  const button = h(
    "button",
    {
      type: "button",
      class: "snug-button",
      "data-snug": "diagnostics",
      title: "Versions, devices, backends and the last minute, as text for a bug report",
      onclick: copy,
    },
    "Copy diagnostics",
  );

  async function copy() {
    button.disabled = true;
    try {
      const diagnostics = await client.get("/snug/telemetry/diagnostics");
      await copyText(JSON.stringify(diagnostics, null, 1));
      toast(app, "success", "Diagnostics copied", "Paste them into your report.");
    } catch (error) {
      const isMissing = error instanceof RequestError && error.isMissing;
      if (isMissing) button.hidden = true;
      toast(app, "error", "Nothing was copied", isMissing ? "This server has no diagnostics." : messageOf(error));
    } finally {
      button.disabled = false;
    }
  }
  return { element: button };
}

/** Browsers have a clipboard only on pages from https and from this computer. @param {string} text */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = h("textarea", { class: "snug-unseen" });
  area.value = text;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  if (!isCopied) throw new Error("The browser does not let a page from this address copy anything.");
}
