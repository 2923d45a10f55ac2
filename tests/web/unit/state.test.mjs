import assert from "node:assert/strict";
import test from "node:test";
import {
  chosenPrompt,
  emptyState,
  latest,
  newCounts,
  promptsOf,
  recentPoints,
  reduce,
} from "../../../web/telemetry/state.mjs";
import { device, history, prompt, sample } from "./records.mjs";

/** @param {import("../../../web/telemetry/state.mjs").Action[]} actions */
const after = (...actions) => actions.reduce(reduce, emptyState());
/** @param {Snug.History} found @param {boolean} [isWhole] */
const read = (found, isWhole = false) => ({ type: /** @type {const} */ ("history"), history: found, isWhole });
/** @param {Snug.Sample} found */
const pushed = (found) => ({ type: /** @type {const} */ ("sample"), sample: found });

test("samples that came twice or late are there once and in order", () => {
  const state = after(
    pushed(sample(3)),
    read(history({ samples: [sample(1), sample(2), sample(3)] })),
    pushed(sample(4)),
  );
  assert.deepEqual(
    state.samples.map(({ number }) => number),
    [1, 2, 3, 4],
  );
  assert.equal(latest(state)?.number, 4);
});

test("memory does not grow without end", () => {
  let state = emptyState();
  for (let number = 1; number <= 3100; number++) state = reduce(state, pushed(sample(number)));
  assert.equal(state.samples.length, 3000);
  for (let number = 0; number < 20; number++) {
    state = reduce(state, read(history({ prompts: [prompt(`p${number}`, { started: number })] })));
  }
  assert.deepEqual(
    state.prompts.map((entry) => entry.prompt_id),
    ["p15", "p16", "p17", "p18", "p19"],
  );
});

test("another server's numbers replace those of the first one", () => {
  const first = after(
    { type: "connection", connection: "live" },
    read(history({ samples: [sample(900)], prompts: [prompt("old")] }), true),
  );
  const state = reduce(first, read(history({ samples: [sample(1)] }), true));
  assert.deepEqual(
    state.samples.map(({ number }) => number),
    [1],
  );
  assert.deepEqual(state.prompts, []);
  assert.equal(state.connection, "live");
});

test("a prompt that runs becomes one that has ended", () => {
  const running = prompt("a", { ended: null });
  const during = after(read(history({ running, prompts: [prompt("before", { started: 900 })] })));
  assert.deepEqual(
    promptsOf(during).map((entry) => entry.prompt_id),
    ["a", "before"],
  );
  const state = reduce(during, read(history({ prompts: [prompt("a", { started: 1000 })] })));
  assert.equal(state.running, null);
  assert.deepEqual(
    promptsOf(state).map((entry) => entry.prompt_id),
    ["a", "before"],
  );
});

test("the running prompt's timeline goes on with the samples that are pushed", () => {
  const running = prompt("a", {
    ended: null,
    timeline: [{ time: 1002, weights: 1, activations: 1, pages: 0, cache: 0 }],
  });
  const states = [read(history({ running })), pushed(sample(2, { running: "x" })), pushed(sample(3, { running: "x" }))];
  const state = after(...states, pushed(sample(4)));
  assert.deepEqual(
    state.running?.timeline.map(({ time }) => time),
    [1002, 1003],
  );
  assert.equal(state.running?.timeline[1].weights, device().weights);
});

test("a prompt that was given up and is recorded again is there once", () => {
  const before = after(read(history({ prompts: [prompt("a")] })));
  const state = reduce(before, read(history({ running: prompt("a", { started: 1005, ended: null }) })));
  assert.deepEqual(
    promptsOf(state).map(({ started }) => started),
    [1005],
  );
  const last = reduce(state, read(history({ prompts: [prompt("a", { started: 1005 })] })));
  assert.equal(promptsOf(last).length, 1);
});

test("the choice falls back to the newest prompt", () => {
  const state = after(read(history({ prompts: [prompt("a", { started: 1 }), prompt("b", { started: 2 })] })));
  assert.equal(chosenPrompt(state, "a")?.prompt_id, "a");
  assert.equal(chosenPrompt(state, "gone")?.prompt_id, "b");
  assert.equal(chosenPrompt(state, null)?.prompt_id, "b");
  assert.equal(chosenPrompt(emptyState(), null), undefined);
});

test("without a prompt the last samples are shown", () => {
  const state = after(read(history({ samples: [sample(1), sample(50), sample(100), sample(101, { devices: [] })] })));
  assert.deepEqual(
    recentPoints(state, 60).map(({ time }) => time),
    [1050, 1100],
  );
  assert.equal(recentPoints(state, 60)[0].weights, device().weights);
});

test("events are there once, and counters tell what is new", () => {
  const load = {
    number: 1,
    time: 5,
    kind: /** @type {const} */ ("load"),
    model: "SD3",
    device: "cuda:0",
    bytes: 7,
    node: null,
  };
  const first = after(read(history({ events: [load], counters: { "cuda:0": { retries: 2, ooms: 1 } } }), true));
  const state = reduce(first, read(history({ events: [load], counters: { "cuda:0": { retries: 5, ooms: 1 } } })));
  assert.equal(state.events.length, 1);
  const more = reduce(state, pushed(sample(3, { events: [{ ...load, number: 2 }] })));
  assert.deepEqual(
    more.events.map(({ number }) => number),
    [1, 2],
  );
  assert.deepEqual(newCounts(state), { "cuda:0": { retries: 3, ooms: 0 } });
});

test("a server that tells no events yet is fine", () => {
  assert.deepEqual(after(read(history(), true)).events, []);
});
