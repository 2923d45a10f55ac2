// @ts-check
/** The running prompt and the last ones: timeline and table of nodes. */

import { bytes, clock, plural, seconds } from "../format.mjs";
import { highest, peakOf } from "../layout.mjs";
import { chosenPrompt, latest, promptsOf, recentPoints } from "../state.mjs";
import { h, keyed, section, set, setText } from "../../dom.mjs";
import { makeNodes } from "./nodes.mjs";
import { makeTimeline } from "./timeline.mjs";

/** Seconds that are shown while no prompt was recorded. */
const RECENT = 120;
/** Stands for the newest prompt in the choice, whichever it is. */
const NEWEST = "newest";

/** @param {{focus: (nodeId: string) => void}} actions @param {HTMLElement} exporter */
export function makePrompts(actions, exporter) {
  const choice = h("select", {
    class: "snug-input snug-wide",
    "aria-label": "Prompt to show",
    onchange: () => redraw(),
  });
  const caption = h("p", { class: "snug-caption" });
  const timeline = makeTimeline(actions);
  const nodes = makeNodes(actions);
  const element = section("Timeline", {}, choice, caption, timeline.element, nodes.element, exporter);
  /** @type {Snug.State | undefined} */
  let shown;

  function redraw() {
    if (shown) update(shown);
  }

  /** @param {Snug.State} state @returns {Snug.Prompt | undefined} the prompt that is shown */
  function update(state) {
    shown = state;
    const prompts = promptsOf(state);
    const entries = [
      { key: NEWEST, text: "Newest prompt" },
      ...prompts.map((prompt) => ({ key: prompt.prompt_id, text: label(prompt) })),
    ];
    keyed(
      choice,
      entries,
      ({ key }) => key,
      ({ key }) => h("option", { value: key }),
      (option, { text }) => setText(option, text),
    );
    choice.hidden = !prompts.length;
    const prompt = chosenPrompt(state, choice.value);
    const now = latest(state)?.time ?? 0;
    timeline.update(drawn(state, prompt, now));
    nodes.update(prompt, Math.max(now, prompt?.started ?? 0));
    set(element, { "data-prompt-id": prompt?.prompt_id });
    setText(caption, captionOf(prompt));
    return prompt;
  }
  return { element, update, resize: timeline.resize };
}

/** @param {Snug.State} state @param {Snug.Prompt | undefined} prompt @param {number} now */
function drawn(state, prompt, now) {
  if (prompt) {
    const end = prompt.ended ?? Math.max(now, prompt.started);
    const isGpu = prompt.device !== "cpu";
    const events = state.events.filter(({ time }) => time >= prompt.started && time <= end);
    return {
      device: prompt.device,
      isGpu,
      points: prompt.timeline,
      nodes: prompt.nodes,
      events,
      start: prompt.started,
      end,
    };
  }
  const device = latest(state)?.devices[0];
  const points = recentPoints(state, RECENT);
  if (!device || points.length < 2) return undefined;
  return { device: device.name, isGpu: device.is_gpu, points, nodes: [], events: [], start: points[0].time, end: now };
}

/** @param {Snug.Prompt} prompt */
function label(prompt) {
  const took = prompt.ended === null ? "running" : seconds(prompt.ended - prompt.started);
  return `${clock(prompt.started)} – ${took}, ${plural(prompt.nodes.length, "node")}`;
}

/** @param {Snug.Prompt | undefined} prompt */
function captionOf(prompt) {
  if (!prompt) return "No prompt has been recorded yet. This is the memory of the last minutes.";
  const what = prompt.device === "cpu" ? "RAM of ComfyUI" : `Memory in use on ${prompt.device}`;
  const node = highest(prompt.nodes, prompt.device);
  const peak = node ? `: peak ${bytes(peakOf(node, prompt.device))} in ${node.title}` : "";
  return `${what}${peak}`;
}
