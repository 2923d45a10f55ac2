// @ts-check
/** What is known of the memory, from what the server sent. Pure: a state and what happened give the next state. */

/** Samples that are kept: ten minutes of a running prompt. */
const MOST_SAMPLES = 3000;
/** Prompts that are kept, as many as the server has. */
const MOST_PROMPTS = 5;
const MOST_EVENTS = 500;

/**
 * @typedef {{type: "connection", connection: Snug.Connection, problem?: string}
 *   | {type: "sample", sample: Snug.Sample}
 *   | {type: "history", history: Snug.History, isWhole: boolean}} Action
 */

/** @returns {Snug.State} */
export function emptyState() {
  return {
    connection: "off",
    problem: "",
    samples: [],
    prompts: [],
    running: null,
    events: [],
    counters: {},
    firstCounters: {},
  };
}

/** @param {Snug.State} state @param {Action} action @returns {Snug.State} */
export function reduce(state, action) {
  switch (action.type) {
    case "connection":
      return { ...state, connection: action.connection, problem: action.problem ?? "" };
    case "sample":
      return withSample(state, action.sample);
    case "history":
      return withHistory(action.isWhole ? forgotten(state) : state, action.history);
  }
}

/** The server may be another one now, that counts anew. @param {Snug.State} state @returns {Snug.State} */
function forgotten(state) {
  return { ...emptyState(), connection: state.connection, problem: state.problem };
}

/**
 * The running prompt's timeline goes on with the samples, until the server's own comes.
 * @param {Snug.State} state @param {Snug.Sample} sample @returns {Snug.State}
 */
function withSample(state, sample) {
  const { running } = state;
  const device = running && sample.running && sample.devices.find(({ name }) => name === running.device);
  const last = running?.timeline[running.timeline.length - 1];
  const isNext = device && (!last || sample.time > last.time);
  return {
    ...state,
    samples: merged(state.samples, [sample]),
    events: mergedEvents(state.events, sample.events ?? []),
    running: isNext ? { ...running, timeline: [...running.timeline, pointOf(sample.time, device)] } : running,
  };
}

/** @param {number} time @param {Snug.Device} device @returns {Snug.Point} */
function pointOf(time, { weights, activations, pages, cache }) {
  return { time, weights, activations, pages, cache };
}

/** @param {Snug.State} state @param {Snug.History} history @returns {Snug.State} */
function withHistory(state, history) {
  const counters = history.counters ?? state.counters;
  return {
    ...state,
    samples: merged(state.samples, history.samples),
    prompts: mergedPrompts(state.prompts, history.prompts),
    running: history.running,
    events: mergedEvents(state.events, history.events ?? []),
    counters,
    firstCounters: { ...counters, ...state.firstCounters },
  };
}

/** @param {Snug.Sample[]} known @param {Snug.Sample[]} more @returns {Snug.Sample[]} in the order of their numbers */
function merged(known, more) {
  const last = known.length ? known[known.length - 1].number : 0;
  if (more.every((sample) => sample.number > last)) return [...known, ...more].slice(-MOST_SAMPLES);
  // A pushed sample came before the history that lacks it, or the other way round.
  const all = new Map([...known, ...more].map((sample) => [sample.number, sample]));
  return [...all.values()].sort((one, other) => one.number - other.number).slice(-MOST_SAMPLES);
}

/** @param {Snug.Prompt[]} known @param {Snug.Prompt[]} more */
function mergedPrompts(known, more) {
  const all = new Map([...known, ...more].map((prompt) => [prompt.prompt_id, prompt]));
  return [...all.values()].sort((one, other) => one.started - other.started).slice(-MOST_PROMPTS);
}

/** @param {Snug.Event[]} known @param {Snug.Event[]} more */
function mergedEvents(known, more) {
  if (!more.length) return known;
  const all = new Map([...known, ...more].map((event) => [event.number, event]));
  return [...all.values()].sort((one, other) => one.number - other.number).slice(-MOST_EVENTS);
}

/** @param {Snug.State} state @returns {Snug.Sample | undefined} */
export function latest(state) {
  return state.samples[state.samples.length - 1];
}

/** Prompts to choose from, the newest first. @param {Snug.State} state @returns {Snug.Prompt[]} */
export function promptsOf(state) {
  const { running } = state;
  const ended = state.prompts.filter(({ prompt_id }) => prompt_id !== running?.prompt_id).reverse();
  return running ? [running, ...ended] : ended;
}

/**
 * The prompt with this id, or the newest one. @param {Snug.State} state @param {string | null} id
 * @returns {Snug.Prompt | undefined}
 */
export function chosenPrompt(state, id) {
  const all = promptsOf(state);
  return all.find((prompt) => prompt.prompt_id === id) ?? all[0];
}

/**
 * The last samples of the main device as points, for a timeline while no prompt was recorded.
 * @param {Snug.State} state @param {number} duration seconds @returns {Snug.Point[]}
 */
export function recentPoints(state, duration) {
  const end = latest(state)?.time ?? 0;
  return state.samples
    .filter((sample) => sample.time >= end - duration && sample.devices.length > 0)
    .map(({ time, devices }) => pointOf(time, devices[0]));
}

/** What happened since the state was first filled. @param {Snug.State} state @returns {Record<string, Snug.Counts>} */
export function newCounts(state) {
  return Object.fromEntries(
    Object.entries(state.counters).map(([device, now]) => {
      const before = state.firstCounters[device] ?? now;
      return [device, { retries: now.retries - before.retries, ooms: now.ooms - before.ooms }];
    }),
  );
}
