// @ts-check
/** What the loaders of the workflow on the canvas will take, before it runs. */

import { RequestError } from "../../request.mjs";
import { bytes } from "../format.mjs";
import { filesToLoad } from "../graph.mjs";
import { latest } from "../state.mjs";
import { h, keyed, section, set, setText } from "../../dom.mjs";

/** Milliseconds between looks at the workflow. */
const PAUSE = 2000;
/** The server takes no more files at once. */
const MOST_FILES = 16;

/** @param {Comfy.App} app @param {import("../client.mjs").TelemetryClient} client */
export function makeForecast(app, client) {
  const verdict = h("p", { class: "snug-verdict" });
  const list = h("ul", { class: "snug-files" });
  const element = section("Next run", { "data-snug": "forecast", hidden: "" }, verdict, list);
  let asked = "";
  let lastLook = 0;
  let isMissing = false;

  /** @param {Snug.State} state */
  function update(state) {
    const now = Date.now();
    if (isMissing || state.connection !== "live" || now < lastLook + PAUSE) return;
    lastLook = now;
    const root = app.rootGraph ?? app.graph;
    const files = root ? filesToLoad(root).slice(0, MOST_FILES) : [];
    if (!files.length) element.hidden = true;
    const models = latest(state)?.models.map(({ name, on_device }) => `${name} ${on_device}`) ?? [];
    const question = JSON.stringify([files, models, state.running === null]);
    if (question === asked || !files.length) return;
    asked = question;
    ask(files, question);
  }

  /** @param {Snug.FileChoice[]} files @param {string} question */
  async function ask(files, question) {
    try {
      const forecast = await client.post("/snug/telemetry/forecast", { files });
      if (question === asked) show(forecast);
    } catch (error) {
      element.hidden = true;
      if (error instanceof RequestError && error.isMissing) isMissing = true;
    }
  }

  /** @param {Snug.Forecast} forecast */
  function show(forecast) {
    const isTight = forecast.offloaded_bytes > 0;
    set(element, {
      "data-bytes": forecast.total_bytes,
      "data-free": forecast.free_bytes,
      "data-offloaded": forecast.offloaded_bytes,
    });
    set(verdict, { class: `snug-verdict${isTight ? " snug-warning" : ""}` });
    setText(verdict, sentence(forecast));
    keyed(
      list,
      forecast.files.map((file, at) => ({ file, key: `${at} ${file.name}` })),
      ({ key }) => key,
      () => h("li", { class: "snug-row" }, h("span", { class: "snug-file" }), h("b", {})),
      (/** @type {HTMLElement} */ row, { file }) => {
        const [name, size] = [.../** @type {HTMLCollectionOf<HTMLElement>} */ (row.children)];
        set(row, { "data-bytes": file.weights_bytes ?? null, title: file.error ?? file.name });
        setText(name, file.name);
        setText(size, file.error ? "unknown" : bytes(file.weights_bytes ?? 0));
      },
    );
    element.hidden = false;
  }
  return { element, update };
}

/** @param {Snug.Forecast} forecast */
function sentence({ files, total_bytes, free_bytes, offloaded_bytes, device }) {
  const where = device === "cpu" ? "RAM" : device;
  const unknown = files.some((file) => file.error) ? " Some files could not be read." : "";
  const need = `The workflow's models take ${bytes(total_bytes)}; ${bytes(free_bytes)} of ${where} can be used.`;
  if (offloaded_bytes <= 0) return `✓ ${need}${unknown}`;
  const offloaded = `${bytes(offloaded_bytes)} would be offloaded, which is slower`;
  return `⚠ ${need} ${offloaded}: take a smaller file, or Group Offload (Snug).${unknown}`;
}
