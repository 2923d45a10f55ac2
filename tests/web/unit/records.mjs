/** What the server sends, for tests. */

const MEGABYTE = 2 ** 20;

/** @param {Partial<Snug.Device>} [changes] @returns {Snug.Device} */
export function device(changes = {}) {
  const parts = { weights: 400, pages: 0, activations: 200, cache: 100, other: 100, free: 200, total: 1000 };
  const sizes = Object.fromEntries(Object.entries(parts).map(([name, size]) => [name, size * MEGABYTE]));
  return /** @type {Snug.Device} */ ({ name: "cuda:0", title: "A GPU", is_gpu: true, ...sizes, ...changes });
}

/** @param {number} number @param {Partial<Snug.Sample>} [changes] @returns {Snug.Sample} */
export function sample(number, changes = {}) {
  return { number, time: 1000 + number, devices: [device()], models: [], running: null, ...changes };
}

/** @param {string} id @param {Partial<Snug.Node>} [changes] @returns {Snug.Node} */
export function node(id, changes = {}) {
  return {
    node_id: id,
    title: `A node #${id}`,
    started: 1000,
    ended: 1001,
    before: { "cuda:0": 100 },
    peak: { "cuda:0": 300 },
    after: { "cuda:0": 200 },
    added: { "cuda:0": 200 },
    steps: [],
    state: "done",
    ...changes,
  };
}

/** @param {string} id @param {Partial<Snug.Prompt>} [changes] @returns {Snug.Prompt} */
export function prompt(id, changes = {}) {
  return { prompt_id: id, device: "cuda:0", started: 1000, ended: 1010, nodes: [], timeline: [], ...changes };
}

/** @param {Partial<Snug.History>} [changes] @returns {Snug.History} */
export function history(changes = {}) {
  return { samples: [], prompts: [], running: null, ...changes };
}

/** @param {number} time @param {number} weights @param {number} [activations] @returns {Snug.Point} */
export function point(time, weights, activations = 0) {
  return { time, weights, activations, pages: 0, cache: 0 };
}
