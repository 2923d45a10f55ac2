// @ts-check
/** Wheel, pointer and keys on a stage of pictures. What is used here goes no further: the page would move its nodes. */

import { ZOOM_STEP, fractionAt, place } from "./geometry.mjs";

/**
 * A box is what clips a picture. @typedef {{element: HTMLElement, picture: import("./geometry.mjs").Size}} Box
 * @typedef {{
 *   view: () => import("./geometry.mjs").View,
 *   boxes: () => Box[],
 *   zoom: (factor: number, point?: {x: number, y: number}) => void,
 *   move: (right: number, down: number) => void,
 *   whole: () => void,
 *   key?: (key: string) => boolean,
 * }} Stage key: whether it was used; move: fractions of a picture
 */

/** Share of what is seen that an arrow moves. */
const STRIDE = 0.1;
/** Pixels of the wheel for a step, as browsers count them. */
const NOTCH = 100;
/** Wheels of some devices report much at once. */
const MOST_NOTCHES = 3;

/** @type {Record<string, [number, number]>} */
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** @param {HTMLElement} element @param {Stage} stage */
export function watchGestures(element, stage) {
  /** @type {{id: number, x: number, y: number, box: Box} | undefined} */
  let drag;

  element.addEventListener(
    "wheel",
    (event) => {
      if (event.ctrlKey) return; // the page's own zoom
      const box = boxAt(event);
      if (!box) return;
      used(event);
      const notches = Math.max(-MOST_NOTCHES, Math.min(MOST_NOTCHES, -event.deltaY / NOTCH));
      const point = localPoint(box.element, event);
      const at = place(stage.view(), sizeOf(box.element), box.picture);
      stage.zoom(ZOOM_STEP ** notches, fractionAt(at, box.picture, point.x, point.y));
    },
    { passive: false },
  );
  element.addEventListener("pointerdown", (event) => {
    event.stopPropagation();
    const box = boxAt(event);
    if (!box || event.button !== 0 || event.defaultPrevented) return;
    const { x, y } = localPoint(element, event);
    drag = { id: event.pointerId, x, y, box };
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointermove", (event) => {
    if (!drag || event.pointerId !== drag.id) return;
    used(event);
    const { x, y } = localPoint(element, event);
    const { picture, element: box } = drag.box;
    const { scale } = place(stage.view(), sizeOf(box), picture);
    stage.move((drag.x - x) / (picture.width * scale), (drag.y - y) / (picture.height * scale));
    Object.assign(drag, { x, y });
  });
  for (const end of /** @type {const} */ (["pointerup", "pointercancel", "lostpointercapture"])) {
    element.addEventListener(end, () => {
      drag = undefined;
    });
  }
  element.addEventListener("dblclick", (event) => {
    used(event);
    stage.whole();
  });
  element.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target !== element) return;
    if (act(event.key)) used(event);
  });

  /** @param {string} key @returns {boolean} */
  function act(key) {
    if (key in ARROWS) {
      const [right, down] = ARROWS[key];
      const stride = STRIDE / stage.view().zoom;
      stage.move(right * stride, down * stride);
    } else if (key === "+" || key === "=") stage.zoom(ZOOM_STEP);
    else if (key === "-" || key === "_") stage.zoom(1 / ZOOM_STEP);
    else if (key === "0") stage.whole();
    else return stage.key?.(key) ?? false;
    return true;
  }

  /** @param {Event} event */
  function boxAt(event) {
    const { target } = event;
    return stage.boxes().find((box) => target instanceof Node && box.element.contains(target));
  }
}

/** @param {Event} event */
export function used(event) {
  event.preventDefault();
  event.stopPropagation();
}

/**
 * In the element's own pixels: nodes are scaled with the canvas.
 * @param {HTMLElement} element @param {MouseEvent} event
 */
export function localPoint(element, event) {
  const box = element.getBoundingClientRect();
  const factor = box.width > 0 ? element.offsetWidth / box.width : 1;
  return { x: (event.clientX - box.left) * factor, y: (event.clientY - box.top) * factor };
}

/** @param {HTMLElement} element @returns {import("./geometry.mjs").Size} */
export function sizeOf(element) {
  return { width: Math.max(1, element.clientWidth), height: Math.max(1, element.clientHeight) };
}
