import assert from "node:assert/strict";
import test from "node:test";
import { alertsOf } from "../../../web/telemetry/alerts.mjs";
import { emptyState, reduce } from "../../../web/telemetry/state.mjs";
import { device, history, node, prompt, sample } from "./records.mjs";

const GB = 2 ** 30;
/** Of a GPU with 24 GB, 0.3 GB of them left. */
const FULL = {
  total: 24 * GB,
  weights: 10 * GB,
  activations: 12 * GB,
  cache: 0.1 * GB,
  other: 1.7 * GB,
  free: 0.2 * GB,
};
const MODEL = {
  name: "Flux",
  device: "cuda:0",
  formats: ["Q4_0"],
  on_device: GB,
  offloaded: 0,
  pinned: 0,
  total: GB,
  is_paged: false,
  last_node: null,
};

/** @param {Partial<Snug.History>} changes */
function stateOf(changes) {
  return reduce(emptyState(), {
    type: "history",
    history: history({ samples: [sample(1)], ...changes }),
    isWhole: true,
  });
}

/** @param {Partial<Snug.Device>} parts @param {Partial<Snug.Sample>} [more] */
function fullness(parts, more = {}) {
  return alertsOf(stateOf({ samples: [sample(1, { devices: [device({ ...FULL, ...parts })], ...more })] }));
}

test("all is well, and nothing is known", () => {
  assert.deepEqual(alertsOf(stateOf({})), []);
  assert.deepEqual(alertsOf(emptyState()), []);
});

test("memory ran out: the node is named and can be shown", () => {
  const event = { number: 2, time: 1000, kind: /** @type {const} */ ("oom"), device: "cuda:0", node: "KSampler #1:7" };
  const [alert, ...others] = alertsOf(stateOf({ events: [{ ...event, number: 1, time: 999, node: null }, event] }));
  assert.deepEqual(others, []);
  assert.equal(alert.severity, "error");
  assert.match(alert.text, /on cuda:0 in KSampler #1:7/);
  assert.deepEqual(alert.action, { label: "Show the node", command: "focus", nodeId: "1:7" });
  assert.deepEqual(alertsOf(stateOf({ events: [{ ...event, time: 300 }] })), []);
});

test("a full device gets the advice that helps most", () => {
  const advice = (/** @type {import("../../../web/telemetry/alerts.mjs").Alert[]} */ alerts) =>
    alerts.map((alert) => alert.advice);
  assert.match(advice(fullness({}, { running: "KSampler #1" }))[0], /smaller size/);
  assert.match(
    advice(fullness({ weights: 14 * GB, activations: 8 * GB }, { running: "KSampler #1" }))[0],
    /smaller file/,
  );
  assert.match(
    advice(fullness({ other: 9 * GB, activations: 4.7 * GB }))[0],
    /Close other programs, which take 9.00 GB \(38%\)/,
  );
  const idle = fullness({}, { models: [MODEL] });
  assert.deepEqual(idle[0].action, { label: "Unload all models", command: "unload" });
});

test("what PyTorch keeps for later counts as left", () => {
  assert.deepEqual(fullness({ cache: 3 * GB, activations: 9 * GB }), []);
});

test("retries are told from the first reading on", () => {
  const counters = { "cuda:0": { retries: 4, ooms: 0 } };
  const first = stateOf({ counters });
  assert.deepEqual(alertsOf(first), []);
  const more = history({
    counters: { "cuda:0": { retries: 5, ooms: 0 } },
    prompts: [prompt("p", { nodes: [node("3"), node("9", { peak: { "cuda:0": 999 } })] })],
  });
  const [alert] = alertsOf(reduce(first, { type: "history", history: more, isWhole: false }));
  assert.match(alert.text, /A GPU: PyTorch had to give back its cache 1 time /);
  assert.equal(alert.action?.command === "focus" && alert.action.nodeId, "9");
});

test("errors come first, and not too many at once", () => {
  const devices = Array.from({ length: 6 }, (_, at) => device({ ...FULL, name: `cuda:${at}` }));
  const events = [{ number: 1, time: 1000, kind: /** @type {const} */ ("oom"), device: "cuda:5", node: null }];
  const alerts = alertsOf(stateOf({ samples: [sample(1, { devices })], events }));
  assert.deepEqual(
    alerts.map(({ severity }) => severity),
    ["error", "warning", "warning", "warning"],
  );
});
