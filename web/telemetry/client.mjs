// @ts-check
/**
 * The connection to Snug's telemetry: it leases samples while somebody looks, and nothing else. Without a lease the
 * server samples nothing, and without a watcher this sets no timer and sends no request.
 */

import { RequestError, messageOf, post, request } from "../request.mjs";

/** Type of the server's messages. */
export const EVENT = "snug.telemetry";
const LEASE_SECONDS = 15;
const RENEW_MS = 5000;
/** While a prompt runs, how often its nodes are asked for at least, and how long after one began. */
const HISTORY_MS = 3000;
const NODE_MS = 1000;
/** A prompt has just begun or ended: the server's record is complete a little later. */
const SOON_MS = 300;
const FIRST_RETRY_MS = 1000;
const LONGEST_RETRY_MS = 30000;

/**
 * @typedef {{setTimeout: (call: () => void, ms: number) => any, clearTimeout: (timer: any) => void}} Timers
 * @typedef {(action: import("./state.mjs").Action) => void} Dispatch
 */

export class TelemetryClient {
  /** @type {Set<symbol>} */ #watchers = new Set();
  /** Counts openings: an answer that comes after the next closing or opening is dropped. */
  #generation = 0;
  #isOpen = false;
  #isLeased = false;
  #failures = 0;
  #lastNumber = 0;
  /** When the last prompt ended that the server told of, and the node of the last sample. */
  #lastEnd = 0;
  /** @type {string | null} */ #lastNode = null;
  #isAsking = false;
  /** @type {any} */ #leaseTimer;
  /** @type {any} */ #historyTimer;
  #historyDelay = 0;

  /** @param {Comfy.Api} api @param {Dispatch} dispatch @param {Timers} [timers] */
  constructor(api, dispatch, timers = globalThis) {
    this.api = api;
    this.dispatch = dispatch;
    // Browsers insist on being called as functions of their window.
    this.timers = {
      setTimeout: timers.setTimeout.bind(timers),
      clearTimeout: timers.clearTimeout.bind(timers),
    };
  }

  get isOpen() {
    return this.#isOpen;
  }

  /** Somebody looks, until the function that is returned is called (any number of times). @returns {() => void} */
  watch() {
    const watcher = Symbol("watcher");
    this.#watchers.add(watcher);
    if (!this.#isOpen) this.#open();
    return () => {
      this.#watchers.delete(watcher);
      if (this.#isOpen && !this.#watchers.size) this.#close();
    };
  }

  /** Asks for what has changed, soon. */
  refresh() {
    if (this.#isOpen) this.#askHistory(SOON_MS);
  }

  /** @param {string} route @param {unknown} body @returns {Promise<any>} Raises RequestError. */
  post(route, body) {
    return post(this.api, route, body);
  }

  /** @param {string} route @returns {Promise<any>} Raises RequestError. */
  get(route) {
    return request(this.api, route, { cache: "no-store" });
  }

  #open() {
    this.#isOpen = true;
    this.#generation += 1;
    this.#failures = 0;
    // Listeners first: ComfyUI's page takes a message that nobody listens to for an error.
    this.api.addEventListener(EVENT, this.#onSample);
    this.api.addEventListener("reconnecting", this.#onReconnecting);
    this.api.addEventListener("reconnected", this.#onReconnected);
    this.api.addEventListener("status", this.#onStatus);
    this.dispatch({ type: "connection", connection: "connecting" });
    this.#lease();
  }

  #close() {
    this.#isOpen = false;
    this.#generation += 1;
    this.#stopTimers();
    this.api.removeEventListener(EVENT, this.#onSample);
    this.api.removeEventListener("reconnecting", this.#onReconnecting);
    this.api.removeEventListener("reconnected", this.#onReconnected);
    this.api.removeEventListener("status", this.#onStatus);
    // The lease ends by itself when the server is not reached.
    if (this.#isLeased) this.#sendLease(0).catch(() => {});
    this.#isLeased = false;
    this.dispatch({ type: "connection", connection: "off" });
  }

  #stopTimers() {
    this.timers.clearTimeout(this.#leaseTimer);
    this.timers.clearTimeout(this.#historyTimer);
    this.#leaseTimer = this.#historyTimer = undefined;
  }

  /** @param {number} seconds 0 ends it */
  #sendLease(seconds) {
    return this.post("/snug/telemetry/lease", { client_id: this.api.clientId ?? "", seconds, push: seconds > 0 });
  }

  async #lease() {
    const generation = this.#generation;
    this.timers.clearTimeout(this.#leaseTimer);
    try {
      await this.#sendLease(LEASE_SECONDS);
    } catch (error) {
      if (generation === this.#generation) this.#retryLease(error);
      return;
    }
    if (generation !== this.#generation) {
      // It was closed meanwhile, and the server got the two requests in an order that is not known.
      if (!this.#isOpen) this.#sendLease(0).catch(() => {});
      return;
    }
    const isFirst = !this.#isLeased;
    this.#isLeased = true;
    this.#failures = 0;
    this.#leaseTimer = this.timers.setTimeout(() => this.#lease(), RENEW_MS);
    if (isFirst) {
      this.#forget();
      this.dispatch({ type: "connection", connection: "live" });
      this.#askHistory(0);
    }
  }

  /** @param {unknown} error */
  #retryLease(error) {
    this.#isLeased = false;
    const isMissing = error instanceof RequestError && error.isMissing;
    this.dispatch({
      type: "connection",
      connection: isMissing ? "unavailable" : "waiting",
      problem: isMissing
        ? "This ComfyUI has no memory telemetry: restart it, and see in its log whether ComfyUI-Snug was loaded."
        : messageOf(error),
    });
    const wait = Math.min(FIRST_RETRY_MS * 2 ** this.#failures, LONGEST_RETRY_MS);
    this.#failures += 1;
    this.#leaseTimer = this.timers.setTimeout(() => this.#lease(), wait);
  }

  #forget() {
    this.#lastNumber = this.#lastEnd = 0;
    this.#lastNode = null;
  }

  /** At the earliest of the times that it was called for. @param {number} ms from now */
  #askHistory(ms) {
    if (this.#historyTimer !== undefined && this.#historyDelay <= ms) return;
    this.timers.clearTimeout(this.#historyTimer);
    this.#historyDelay = ms;
    this.#historyTimer = this.timers.setTimeout(() => this.#history(), ms);
  }

  async #history() {
    this.#historyTimer = undefined;
    if (!this.#isLeased) return;
    if (this.#isAsking) {
      this.#askHistory(SOON_MS); // what is under way may not know yet what this is asked for
      return;
    }
    const generation = this.#generation;
    const since = this.#lastNumber;
    this.#isAsking = true;
    let history;
    try {
      history = await this.get(`/snug/telemetry/history?since=${since}&ended_after=${this.#lastEnd}`);
    } catch {
      // The lease finds out what is wrong, and asks again when all is well.
      if (generation === this.#generation) this.#askHistory(RENEW_MS);
      return;
    } finally {
      this.#isAsking = false;
    }
    if (generation !== this.#generation) {
      if (this.#isOpen) this.#askHistory(0);
      return;
    }
    this.#note(history);
    this.dispatch({ type: "history", history, isWhole: since === 0 });
    if (history.running) this.#askHistory(HISTORY_MS);
  }

  /** @param {Snug.History} history */
  #note(history) {
    for (const { number } of history.samples) this.#lastNumber = Math.max(this.#lastNumber, number);
    for (const { ended } of history.prompts) this.#lastEnd = Math.max(this.#lastEnd, ended ?? 0);
  }

  /** @param {CustomEvent<Snug.Sample>} event */
  #onSample = (event) => {
    const sample = event.detail;
    if (!this.#isLeased) return;
    if (sample.number < this.#lastNumber) {
      this.#forget(); // it counts anew: another server
      this.#askHistory(0);
      return;
    }
    this.#lastNumber = sample.number;
    this.dispatch({ type: "sample", sample });
    if (sample.running !== this.#lastNode) this.#askHistory(NODE_MS);
    this.#lastNode = sample.running;
  };

  /** The queue has changed: a prompt began or ended. */
  #onStatus = () => {
    if (this.#isLeased) this.#askHistory(SOON_MS);
  };

  #onReconnecting = () => {
    this.#generation += 1;
    this.#isLeased = false;
    this.#stopTimers();
    this.dispatch({
      type: "connection",
      connection: "waiting",
      problem: "ComfyUI does not answer; this goes on when it is back.",
    });
  };

  #onReconnected = () => {
    this.#generation += 1;
    this.#isLeased = false;
    this.#failures = 0;
    this.#stopTimers();
    this.#lease();
  };
}
