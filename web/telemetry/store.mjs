// @ts-check
/** Keeps the state, and tells who wants to know that it has changed. */

import { emptyState, reduce } from "./state.mjs";

export class Store {
  state = emptyState();
  /** @type {Set<() => void>} */ #listeners = new Set();

  /** @param {import("./state.mjs").Action} action */
  dispatch = (action) => {
    this.state = reduce(this.state, action);
    for (const listener of [...this.#listeners]) listener();
  };

  /** @param {() => void} listener @returns {() => void} ends it */
  subscribe(listener) {
    this.#listeners.add(listener);
    return () => {
      this.#listeners.delete(listener);
    };
  }
}
