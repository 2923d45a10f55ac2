// @ts-check
/** Where things are drawn: stacked bars, axes, the lanes of nodes, areas over time, and what is under the pointer. */

/** From the first to the last of a bar, and from the bottom up in the timeline. @type {readonly Snug.Part[]} */
export const PARTS = ["weights", "pages", "activations", "cache", "other", "free"];
/** Those that the timeline has. @type {readonly ("weights" | "pages" | "activations" | "cache")[]} */
export const AREAS = ["weights", "pages", "activations", "cache"];

/** @param {Snug.Part} part @param {boolean} isGpu */
export function partName(part, isGpu) {
  switch (part) {
    case "weights":
      return "model weights";
    case "pages":
      return "paged weights";
    case "activations":
      return isGpu ? "activations" : "rest of ComfyUI";
    case "cache":
      return "cache";
    case "other":
      return isGpu ? "driver and others" : "other programs";
    case "free":
      return "free";
  }
}

/** @param {Snug.Part} part @param {boolean} isGpu */
export function partHelp(part, isGpu) {
  switch (part) {
    case "weights":
      return "Weights of the models that ComfyUI has loaded.";
    case "pages":
      return "Weights that ComfyUI's dynamic VRAM holds; it gives them up when memory is needed.";
    case "activations":
      return isGpu
        ? "What nodes compute with: latents, intermediate results, LoRA."
        : "ComfyUI itself, its libraries, and what nodes compute with.";
    case "cache":
      return "Kept by PyTorch for later and used again when a node needs memory.";
    case "other":
      return isGpu ? "The GPU's driver and other programs." : "Other programs and the operating system.";
    case "free":
      return "Nobody uses it.";
  }
}

/**
 * The parts of a device as shares of its total, without empty ones.
 * @param {Snug.Device} device
 * @returns {{part: Snug.Part, bytes: number, share: number}[]} share: from 0 to 1
 */
export function segments(device) {
  return PARTS.filter((part) => device[part] > 0).map((part) => ({
    part,
    bytes: device[part],
    share: device.total > 0 ? device[part] / device.total : 0,
  }));
}

/** @param {Snug.Device | Snug.Point} parts @returns {number} bytes that ComfyUI uses, without PyTorch's cache */
export function used(parts) {
  return parts.weights + parts.pages + parts.activations;
}

/**
 * Values for an axis of bytes, a power of two apart, so that labels are whole MB or GB.
 * @param {number} top the largest value @param {number} most number of steps @returns {number[]} from 0 on
 */
export function byteTicks(top, most) {
  let step = 2 ** 20;
  while (top / step > most) step *= 2;
  const ticks = [];
  for (let value = 0; value <= top; value += step) ticks.push(value);
  return ticks;
}

/** @param {number} span seconds @param {number} most number of steps @returns {number[]} from 0 on */
export function timeTicks(span, most) {
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600];
  const step = steps.find((value) => span / value <= most) ?? Math.ceil(span / most / 3600) * 3600;
  const ticks = [];
  for (let number = 0; number * step <= span; number++) ticks.push(number * step);
  return ticks;
}

/**
 * @param {number} start @param {number} end both in seconds
 * @param {number} left @param {number} right both in pixels
 */
export function timeScale(start, end, left, right) {
  const span = Math.max(end - start, 1e-3);
  return {
    /** @param {number} time */
    x: (time) => left + (Math.min(Math.max(time - start, 0), span) / span) * (right - left),
    /** @param {number} x */
    time: (x) => start + (Math.min(Math.max(x - left, 0), right - left) / (right - left)) * span,
  };
}

/** @typedef {ReturnType<typeof timeScale>} TimeScale */

/**
 * At most one point for each column of pixels: the one with the most in use, so that peaks stay.
 * @param {readonly Snug.Point[]} points @param {TimeScale} scale
 */
export function thin(points, scale) {
  /** @type {Snug.Point[]} */
  const kept = [];
  let column = Number.NaN;
  for (const point of points) {
    const here = Math.round(scale.x(point.time));
    const last = kept[kept.length - 1];
    if (here !== column || !last) kept.push(point);
    else if (total(point) > total(last)) kept[kept.length - 1] = point;
    column = here;
  }
  return kept;
}

/** @param {Snug.Point} point */
function total(point) {
  return used(point) + point.cache;
}

/**
 * Outlines of the areas, one on top of the other, as paths of SVG. The first value also stands for the time before it,
 * the last for that after it.
 * @param {readonly Snug.Point[]} points @param {TimeScale} scale
 * @param {{left: number, right: number, y: (bytes: number) => number}} box
 * @returns {{part: typeof AREAS[number], path: string}[]} without areas that are empty all the time
 */
export function areas(points, scale, box) {
  const shown = thin(points, scale);
  if (!shown.length) return [];
  const xs = [box.left, ...shown.map((point) => scale.x(point.time)), box.right];
  const values = [shown[0], ...shown, shown[shown.length - 1]];
  let below = values.map(() => 0);
  const found = [];
  for (const part of AREAS) {
    const start = below;
    const above = values.map((point, at) => start[at] + point[part]);
    below = above;
    if (above.every((value, at) => value === start[at])) continue;
    const up = above.map((value, at) => `${round(xs[at])},${round(box.y(value))}`);
    const down = start.map((value, at) => `${round(xs[at])},${round(box.y(value))}`).reverse();
    found.push({ part, path: `M${up.join("L")}L${down.join("L")}Z` });
  }
  return found;
}

/** @param {number} value */
function round(value) {
  return Math.round(value * 10) / 10;
}

/**
 * A bar for each node, in the first lane that is free then; those that find none are left out.
 * @param {readonly Snug.Node[]} nodes @param {TimeScale} scale @param {number} now @param {number} most lanes
 * @returns {{bars: {node: Snug.Node, lane: number, x: number, width: number}[], left: number}}
 */
export function lanes(nodes, scale, now, most) {
  const free = Array.from({ length: most }, () => Number.NEGATIVE_INFINITY);
  const bars = [];
  let left = 0;
  for (const node of [...nodes].sort((one, other) => one.started - other.started)) {
    const x = scale.x(node.started);
    const width = Math.max(scale.x(node.ended ?? now) - x, 2);
    const lane = free.findIndex((end) => end <= x + 0.01);
    if (lane < 0) {
      left += 1;
      continue;
    }
    free[lane] = x + width;
    bars.push({ node, lane, x, width });
  }
  return { bars, left };
}

/**
 * The point that is valid at a time: the last one before it, or the first of all.
 * @param {readonly Snug.Point[]} points in the order of time @param {number} time
 */
export function pointAt(points, time) {
  let low = 0;
  let high = points.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle].time <= time) low = middle + 1;
    else high = middle;
  }
  return points[Math.max(0, low - 1)];
}

/**
 * The node that had the highest peak of a device.
 * @param {readonly Snug.Node[]} nodes @param {string} device @returns {Snug.Node | undefined}
 */
export function highest(nodes, device) {
  let found;
  for (const node of nodes) if (!found || peakOf(node, device) > peakOf(found, device)) found = node;
  return found;
}

/** @param {Snug.Node} node @param {string} device */
export function peakOf(node, device) {
  return node.peak[device] ?? 0;
}
