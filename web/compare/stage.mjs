// @ts-check
/** The pictures of a comparison in their panes. */

import { h, set, setText } from "../dom.mjs";
import { differenceOf, heatMap } from "./difference.mjs";
import { columns } from "./geometry.mjs";
import { localPoint, sizeOf, used, watchGestures } from "./gestures.mjs";
import { makeImage, pixelsOf, putContent } from "./pictures.mjs";
import { detailOf, differenceText, mismatch, nameOf } from "./wording.mjs";

/** Pixels below a picture of the grid: two lines. */
const LABEL = 38;
const SLIDER_STEP = 0.02;

/**
 * layers: what a pane shows on top of one another; number: of the picture, null for the map of differences.
 * @typedef {{content: HTMLImageElement | HTMLCanvasElement, layer: HTMLElement, number: number | null}} Layer
 * @typedef {{element: HTMLElement, picture: Snug.Picture, layers: Layer[]}} Pane
 * @typedef {(action: import("./state.mjs").Action) => void} Dispatch
 */

export class Stage {
  /** @type {Snug.Comparison | undefined} */ #shown;
  /** @type {import("./state.mjs").State | undefined} */ #state;
  /** What the panes were built for. */ #built = "";
  /** @type {Pane[]} */ #panes = [];
  /** @type {HTMLElement[]} */ #labels = [];
  /** @type {HTMLElement | undefined} */ #handle;
  #secondIsUp = false;
  /** @type {{key: string, difference: import("./difference.mjs").Difference | null}} */
  #difference = { key: "", difference: null };

  /**
   * @param {Dispatch} dispatch @param {(file: Snug.PictureFile) => string} urlOf
   * @param {{key: (key: string) => boolean, missing: () => void, tell: (text: string) => void,
   *   detail?: (number: number) => string, keys: string}} actions
   *   tell: what the two pictures that are shown have to say; detail: below a picture, instead of its numbers;
   *   keys: what those of `key` do, for those who cannot see it
   */
  constructor(dispatch, urlOf, actions) {
    this.dispatch = dispatch;
    this.urlOf = urlOf;
    this.actions = actions;
    this.element = h("div", {
      class: "snug-stage",
      tabindex: 0,
      role: "group",
      "data-snug": "stage",
      "data-capture-wheel": "true", // by this ComfyUI's page knows that the wheel is used here
    });
    watchGestures(this.element, {
      view: () => this.#state?.view ?? { zoom: 1, x: 0.5, y: 0.5 },
      boxes: () => this.#panes,
      zoom: (factor, point) => dispatch({ type: "zoom", factor, point }),
      move: (right, down) => dispatch({ type: "move", right, down }),
      whole: () => dispatch({ type: "whole" }),
      key: actions.key,
    });
    new ResizeObserver(() => this.#place()).observe(this.element);
  }

  /** @param {Snug.Comparison} shown @param {import("./state.mjs").State} state */
  update(shown, state) {
    const isOther = shown !== this.#shown;
    this.#shown = shown;
    this.#state = state;
    const key = state.mode === "grid" ? "grid" : `${state.mode} ${state.first} ${state.second}`;
    if (isOther || key !== this.#built) {
      this.#built = key;
      this.#build(shown, state);
    }
    this.#fill(shown, state);
    this.#place();
  }

  /** In the mode blink. @param {boolean} isUp whether the second picture is seen */
  showSecond(isUp) {
    this.#secondIsUp = isUp;
    if (this.#state?.mode !== "blink" || !this.#shown) return;
    const [pane] = this.#panes;
    pane.layers.forEach(({ layer }, place) => layer.classList.toggle("snug-away", (place === 1) !== isUp));
    const number = isUp ? this.#state.second : this.#state.first;
    setText(this.#labels[0], nameOf(this.#shown.pictures[number], number));
    set(this.element, { "data-up": number });
  }

  get secondIsUp() {
    return this.#secondIsUp;
  }

  /** @param {Snug.Comparison} shown @param {import("./state.mjs").State} state */
  #build(shown, state) {
    this.#panes = [];
    this.#labels = [];
    this.#handle = undefined;
    const { first, second, mode } = state;
    /** @type {HTMLElement[]} */
    const children = [];
    if (mode === "grid") {
      shown.pictures.forEach((picture, number) => {
        const pane = this.#addPane(picture, [number]);
        const label = h("div", { class: "snug-label" }, h("b", {}), h("span", {}));
        this.#labels.push(label);
        children.push(h("div", { class: "snug-cell", "data-picture": number }, pane.element, label));
      });
    } else if (mode === "difference") {
      children.push(this.#addPane(shown.pictures[first], [null]).element);
    } else {
      const pane = this.#addPane(shown.pictures[first], [first, second]);
      this.#labels = [h("div", { class: "snug-over" }), h("div", { class: "snug-over snug-right" })];
      pane.element.append(...(mode === "slider" ? this.#labels : this.#labels.slice(0, 1)));
      if (mode === "slider") pane.element.append((this.#handle = this.#makeHandle(pane.element)));
      children.push(pane.element);
    }
    set(this.element, { "data-mode": mode, "data-up": null });
    const numbers = mode === "grid" ? shown.pictures.keys() : [first, second];
    const names = [...numbers].map((number) => nameOf(shown.pictures[number], number)).join("; ");
    const keys = `Plus and minus zoom, arrows move, 0 shows all, ${this.actions.keys}`;
    set(this.element, { "aria-label": `${names}. ${keys}.` });
    this.element.replaceChildren(...children);
  }

  /** @param {Snug.Picture} picture @param {(number | null)[]} numbers */
  #addPane(picture, numbers) {
    const layers = numbers.map((number) => {
      const content =
        number === null
          ? h("canvas", { class: "snug-content", role: "img", "aria-label": "Map of the differences" })
          : makeImage(this.#pictureOf(number), nameOf(this.#pictureOf(number), number), this.actions.missing);
      return { content, layer: h("div", { class: "snug-layer" }, content), number };
    });
    const element = h("div", { class: "snug-pane" }, ...layers.map(({ layer }) => layer));
    const pane = { element, picture, layers };
    this.#panes.push(pane);
    return pane;
  }

  /** @param {number} number */
  #pictureOf(number) {
    if (!this.#shown) throw new Error("Nothing is shown.");
    return this.#shown.pictures[number];
  }

  /** @param {HTMLElement} pane */
  #makeHandle(pane) {
    const handle = h("div", {
      class: "snug-handle",
      role: "slider",
      tabindex: 0,
      "data-snug": "handle",
      "aria-label": "Boundary between the two pictures",
      "aria-valuemin": 0,
      "aria-valuemax": 100,
    });
    handle.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.stopPropagation();
      handle.setPointerCapture(event.pointerId);
      handle.focus({ preventScroll: true });
    });
    handle.addEventListener("pointermove", (event) => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      used(event);
      this.dispatch({ type: "split", split: localPoint(pane, event).x / sizeOf(pane).width });
    });
    handle.addEventListener("keydown", (event) => {
      const split = this.#state?.split ?? 0.5;
      /** @type {Record<string, number>} */
      const keys = { ArrowLeft: split - SLIDER_STEP, ArrowRight: split + SLIDER_STEP, Home: 0, End: 1 };
      if (!(event.key in keys) || event.ctrlKey || event.altKey || event.metaKey) return;
      used(event);
      this.dispatch({ type: "split", split: keys[event.key] });
    });
    return handle;
  }

  /** Sources and words. @param {Snug.Comparison} shown @param {import("./state.mjs").State} state */
  #fill(shown, state) {
    for (const { layers } of this.#panes) {
      for (const { content, number } of layers) {
        if (number !== null) set(content, { src: this.#url(number, state.index) });
      }
    }
    const { first, second } = state;
    if (state.mode === "grid") {
      this.#labels.forEach((label, number) => {
        const [name, detail] = label.children;
        setText(name, nameOf(shown.pictures[number], number));
        setText(detail, this.actions.detail?.(number) ?? detailOf(shown, number, state.index));
        set(label, { title: `${name.textContent}\n${detail.textContent}` });
      });
      this.actions.tell("");
      return;
    }
    if (state.mode === "slider") {
      setText(this.#labels[0], nameOf(shown.pictures[first], first));
      setText(this.#labels[1], nameOf(shown.pictures[second], second));
    }
    if (state.mode === "blink") this.showSecond(this.#secondIsUp);
    if (state.mode === "difference") this.#drawDifference(shown, state);
    else if (first === 0 || second === 0) {
      const other = first === 0 ? second : first;
      this.actions.tell(other === 0 ? "" : detailOf(shown, other, state.index));
    } else this.actions.tell("");
  }

  /** @param {number} number @param {number} index */
  #url(number, index) {
    const { files } = this.#pictureOf(number);
    return this.urlOf(files[Math.min(index, files.length - 1)]);
  }

  /** @param {Snug.Comparison} shown @param {import("./state.mjs").State} state */
  async #drawDifference(shown, { first, second, index, gain }) {
    const problem = mismatch(shown, first, second);
    const [{ element, layers, picture }] = this.#panes;
    element.classList.toggle("snug-away", problem !== "");
    if (problem) {
      this.actions.tell(problem);
      return;
    }
    const urls = [this.#url(first, index), this.#url(second, index)];
    const key = urls.join(" ");
    if (key !== this.#difference.key) {
      this.#difference = { key, difference: null };
      try {
        const [a, b] = await Promise.all(urls.map((url) => pixelsOf(url, picture)));
        if (this.#difference.key !== key) return;
        this.#difference.difference = differenceOf(a.data, b.data);
      } catch {
        this.#difference.key = "";
        this.actions.missing();
        return;
      }
    }
    const { difference } = this.#difference;
    const canvas = layers[0].content;
    if (!difference || !(canvas instanceof HTMLCanvasElement) || !canvas.isConnected) return;
    this.actions.tell(differenceText(difference));
    // While pictures were loaded, another gain may have been chosen.
    const now = this.#state?.gain ?? gain;
    const drawn = `${now} ${key}`;
    if (canvas.dataset.drawn === drawn) return;
    canvas.dataset.drawn = drawn;
    canvas.width = picture.width;
    canvas.height = picture.height;
    canvas.getContext("2d")?.putImageData(new ImageData(heatMap(difference, now), picture.width), 0, 0);
  }

  /** Sizes and places. */
  #place() {
    const state = this.#state;
    const shown = this.#shown;
    if (!state || !shown || !this.element.clientWidth) return;
    if (state.mode === "grid") {
      const number = columns(this.#panes.length, sizeOf(this.element), shown.pictures[0], LABEL);
      this.element.style.setProperty("--snug-columns", String(number));
    }
    for (const { element, layers, picture } of this.#panes) {
      const size = sizeOf(element);
      for (const { content, number } of layers) {
        putContent(content, state.view, size, number === null ? picture : shown.pictures[number]);
      }
    }
    if (this.#handle) {
      const [pane] = this.#panes;
      const percent = Math.round(100 * state.split);
      pane.layers[1].layer.style.clipPath = `inset(0 0 0 ${100 * state.split}%)`;
      this.#handle.style.left = `${100 * state.split}%`;
      set(this.#handle, { "aria-valuenow": percent, "aria-valuetext": `${percent}% of the first picture` });
    }
  }
}
