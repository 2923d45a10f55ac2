// @ts-check
/** What deserves attention, each with the one thing to do about it. Pure. */

import { bytes, percent, plural } from "./format.mjs";
import { latest, newCounts, promptsOf } from "./state.mjs";

/**
 * @typedef {{label: string, command: "unload"} | {label: string, command: "focus", nodeId: string}} AlertAction
 * @typedef {{id: string, severity: "error" | "warning", text: string, advice: string, action?: AlertAction}} Alert
 */

/** Shares of a device's memory. */
const NEARLY_FULL = 0.05;
const MUCH = 0.25;
/** An error counts as news for so many seconds after the last thing that happened. */
const RECENT = 600;
const MOST = 4;

/** @param {Snug.State} state @returns {Alert[]} the worst first */
export function alertsOf(state) {
  const sample = latest(state);
  if (!sample) return [];
  const found = [...outOfMemory(state, sample.time), ...sample.devices.flatMap((device) => fullness(device, sample))];
  found.push(...retries(state, sample));
  const severities = ["error", "warning"];
  found.sort((one, other) => severities.indexOf(one.severity) - severities.indexOf(other.severity));
  return found.slice(0, MOST);
}

/** @param {Snug.State} state @param {number} now @returns {Alert[]} of the newest one alone */
function outOfMemory(state, now) {
  const event = state.events.filter(({ kind, time }) => kind === "oom" && now - time < RECENT).pop();
  if (!event) return [];
  const where = event.device ? ` on ${event.device}` : "";
  const node = event.node ? ` in ${event.node}` : "";
  const nodeId = event.node ? idOf(event.node) : null;
  return [
    {
      id: `oom ${event.time}`,
      severity: "error",
      text: `Memory ran out${where}${node}.`,
      advice: "Choose a smaller size or batch, or put Memory Budget (Snug) or Group Offload (Snug) behind the loader.",
      ...(nodeId ? { action: { label: "Show the node", command: "focus", nodeId } } : {}),
    },
  ];
}

/** Titles end in "#" and the node's id. @param {string} title */
function idOf(title) {
  const at = title.lastIndexOf("#");
  return at < 0 ? null : title.slice(at + 1);
}

/** @param {Snug.Device} device @param {Snug.Sample} sample @returns {Alert[]} */
function fullness(device, sample) {
  const left = device.free + device.cache;
  if (!(device.total > 0) || left >= NEARLY_FULL * device.total) return [];
  const name = device.title === "RAM" ? "RAM" : device.title;
  const full = `${name} is nearly full: ${bytes(left)} of ${bytes(device.total)} left.`;
  const alert = { id: `full ${device.name}`, severity: /** @type {const} */ ("warning"), text: full };
  if (device.other > MUCH * device.total) {
    const share = percent(device.other, device.total);
    return [{ ...alert, advice: `Close other programs, which take ${bytes(device.other)} (${share}).` }];
  }
  if (!sample.running && sample.models.length && device.weights + device.pages > 0) {
    return [{ ...alert, advice: "Unload the models.", action: { label: "Unload all models", command: "unload" } }];
  }
  if (device.weights > device.total / 2) {
    return [{ ...alert, advice: "Load a smaller file of the model, such as a Q4_K GGUF." }];
  }
  return [{ ...alert, advice: "Choose a smaller size or batch, or decode with VAE Decode (Tiled)." }];
}

/** @param {Snug.State} state @param {Snug.Sample} sample @returns {Alert[]} */
function retries(state, sample) {
  return Object.entries(newCounts(state))
    .filter(([, counts]) => counts.retries > 0)
    .map(([device, counts]) => ({
      id: `retries ${device}`,
      severity: /** @type {const} */ ("warning"),
      text:
        `${titleOf(sample, device)}: PyTorch had to give back its cache ${plural(counts.retries, "time")} to find ` +
        "memory, which makes runs slower.",
      advice: "Put Memory Budget (Snug) behind the loaders, with a little less than the device has.",
      ...focus(promptsOf(state)[0], device),
    }));
}

/** @param {Snug.Prompt | undefined} prompt @param {string} device @returns {{action?: AlertAction}} */
function focus(prompt, device) {
  const nodes = prompt?.nodes ?? [];
  const node = nodes.reduce(
    (best, next) => (!best || (next.peak[device] ?? 0) > (best.peak[device] ?? 0) ? next : best),
    /** @type {Snug.Node | null} */ (null),
  );
  return node
    ? { action: { label: "Show the node with the highest peak", command: "focus", nodeId: node.node_id } }
    : {};
}

/** @param {Snug.Sample} sample @param {string} name */
function titleOf(sample, name) {
  return sample.devices.find((device) => device.name === name)?.title ?? name;
}
