// @ts-check
/** A prompt as a file, with the same columns and numbers that the server writes. Pure. */

const COLUMNS = [
  "node_id",
  "node",
  "state",
  "start_seconds",
  "seconds",
  "device",
  "before_bytes",
  "peak_bytes",
  "after_bytes",
];

/** @param {Snug.Prompt} prompt @returns {string} a line for each node and device */
export function asCsv(prompt) {
  const lines = [COLUMNS, ...prompt.nodes.flatMap((node) => rows(node, prompt.started))];
  return lines.map((cells) => `${cells.map(cell).join(",")}\n`).join("");
}

/** @param {Snug.Node} node @param {number} start */
function rows(node, start) {
  return Object.entries(node.peak).map(([device, peak]) => [
    node.node_id,
    node.title,
    node.state,
    (node.started - start).toFixed(6),
    node.ended === null ? "" : (node.ended - node.started).toFixed(6),
    device,
    String(node.before[device] ?? 0),
    String(peak),
    String(node.after[device] ?? 0),
  ]);
}

/** @param {string} text */
function cell(text) {
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** @param {Snug.Prompt} prompt @param {Snug.Sample | undefined} now */
export function asJson(prompt, now) {
  return JSON.stringify({ ...prompt, now: now ?? null }, null, 1);
}
