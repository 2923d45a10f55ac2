// @ts-check
/** Memory over the time of a prompt, its nodes below, and the highest peak; SVG takes the page's colours by itself. */

import { axisBytes, bytes, seconds, shorten } from "../format.mjs";
import {
  AREAS,
  areas,
  byteTicks,
  highest,
  lanes,
  partName,
  peakOf,
  pointAt,
  timeScale,
  timeTicks,
  used,
} from "../layout.mjs";
import { freshId, h, set, setText, svg } from "../../dom.mjs";

const LEFT = 52;
const RIGHT = 8;
const TOP = 26;
const AREA = 120;
const AXIS = 18;
const LANES = 5;
const LANE = 19;
/** Pixels of a letter, at most. */
const LETTER = 6;
const NODE_COLOURS = 6;
/** Space over the highest value. */
const HEADROOM = 1.12;

/** Patterns on top of the colours: lines are hatched, the rest dotted; distances in pixels. */
const PATTERNS = {
  pages: { kind: "lines", distance: 6 },
  activations: { kind: "dots", distance: 7 },
  cache: { kind: "lines", distance: 10 },
};

/**
 * @typedef {{device: string, isGpu: boolean, points: Snug.Point[], nodes: Snug.Node[], events: Snug.Event[],
 *   start: number, end: number}} Shown
 * @param {{focus: (nodeId: string) => void}} actions
 */
export function makeTimeline(actions) {
  /** @type {Map<string, string>} */
  const patterns = new Map(Object.keys(PATTERNS).map((part) => [part, freshId(part)]));
  const defs = svg(
    "defs",
    {},
    ...Object.entries(PATTERNS).map(([part, look]) => pattern(patterns.get(part) ?? "", look)),
  );
  const content = svg("g", {});
  const cursor = svg("line", { class: "snug-cursor", y1: TOP, y2: TOP + AREA, visibility: "hidden" });
  const picture = svg(
    "svg",
    { role: "img", class: "snug-picture", onpointermove: point, onpointerleave: leave },
    defs,
    content,
    cursor,
  );
  const reading = h("div", { class: "snug-faint snug-reading", "aria-hidden": "true" });
  const element = h("div", { class: "snug-timeline", "data-snug": "timeline" }, picture, reading);
  /** @type {Shown | undefined} */
  let shown;
  let width = 0;
  let resting = "";

  /** @param {Shown | undefined} now */
  function update(now) {
    shown = now;
    element.hidden = !now;
    if (now) draw(now);
  }

  /** To be called when the panel has another width. */
  function resize() {
    if (shown && Math.round(element.clientWidth) !== width) draw(shown);
  }

  /** @param {Shown} now */
  function draw(now) {
    width = Math.round(element.clientWidth) || 320;
    const right = width - RIGHT;
    const scale = timeScale(now.start, now.end, LEFT, right);
    const peakNode = highest(now.nodes, now.device);
    const most = now.points.reduce(
      (top, at) => Math.max(top, used(at) + at.cache),
      peakNode ? peakOf(peakNode, now.device) : 1,
    );
    const top = Math.max(most, 1) * HEADROOM;
    const y = (/** @type {number} */ value) => TOP + AREA - (value / top) * AREA;
    const placed = lanes(now.nodes, scale, now.end, LANES);
    const usedLanes = placed.bars.reduce((count, bar) => Math.max(count, bar.lane + 1), 0);
    const height = TOP + AREA + AXIS + usedLanes * LANE + 2;
    set(picture, { width, height, viewBox: `0 0 ${width} ${height}`, "aria-label": describe(now, peakNode) });
    content.replaceChildren(
      ...grid(top, y, right),
      ...areas(now.points, scale, { left: LEFT, right, y }).flatMap(({ part, path }) => [
        svg("path", { d: path, class: `snug-area snug-${part}`, "data-part": part }),
        ...(patterns.has(part) ? [svg("path", { d: path, fill: `url(#${patterns.get(part)})` })] : []),
      ]),
      ...now.events.map((event) => eventMark(event, scale.x(event.time))),
      ...times(now, scale),
      ...placed.bars.flatMap((bar, at) => lane(bar, at, bar.node === peakNode, scale)),
      ...(peakNode ? peakMark(peakNode, now, scale, y, right) : []),
    );
    resting = placed.left ? `${placed.left} more nodes ran at the same time; the table has all of them.` : "";
    leave();
  }

  /** @param {{node: Snug.Node, lane: number, x: number, width: number}} bar @param {number} at @param {boolean} isPeak
   *  @param {import("../layout.mjs").TimeScale} scale */
  function lane(bar, at, isPeak, scale) {
    const { node, x } = bar;
    const y = TOP + AREA + AXIS + bar.lane * LANE;
    const colour = node.state === "stopped" ? "stopped" : String(at % NODE_COLOURS);
    const letters = Math.floor((bar.width - 8) / LETTER);
    return [
      svg(
        "g",
        {
          class: "snug-lane",
          "data-node-id": node.node_id,
          "data-state": node.state,
          onclick: () => actions.focus(node.node_id),
        },
        svg("title", {}, `${node.title}\npeak ${bytes(peakOf(node, shown?.device ?? ""))}`),
        svg("rect", {
          x,
          y,
          width: bar.width,
          height: LANE - 4,
          rx: 2,
          class: `snug-node-${colour}${isPeak ? " snug-highest" : ""}`,
        }),
        ...node.steps.map((time) =>
          svg("line", { class: "snug-step", x1: scale.x(time), x2: scale.x(time), y1: y + LANE - 8, y2: y + LANE - 4 }),
        ),
        letters >= 4 &&
          svg("text", { x: x + 4, y: y + LANE - 8, class: "snug-lane-name" }, shorten(node.title, letters)),
      ),
    ];
  }

  /** @param {PointerEvent} event */
  function point(event) {
    if (!shown?.points.length) return;
    const x = event.clientX - picture.getBoundingClientRect().left;
    const scale = timeScale(shown.start, shown.end, LEFT, width - RIGHT);
    const time = scale.time(x);
    const at = pointAt(shown.points, time);
    const { isGpu } = shown;
    const parts = AREAS.filter((part) => at[part] > 0).map((part) => `${partName(part, isGpu)} ${bytes(at[part])}`);
    set(cursor, { x1: scale.x(time), x2: scale.x(time), visibility: "visible" });
    setText(reading, `${seconds(time - shown.start)}: ${parts.join(", ")}`);
  }

  function leave() {
    set(cursor, { visibility: "hidden" });
    setText(reading, resting);
  }

  return { element, update, resize };
}

/** @param {string} id @param {{kind: string, distance: number}} look */
function pattern(id, { kind, distance }) {
  const mark =
    kind === "dots"
      ? svg("circle", { cx: 2, cy: 2, r: 0.9, class: "snug-dot" })
      : svg("line", { x1: 0, y1: 0, x2: 0, y2: distance, class: "snug-hatch" });
  const turned = kind === "dots" ? null : "rotate(45)";
  return svg(
    "pattern",
    { id, width: distance, height: distance, patternUnits: "userSpaceOnUse", patternTransform: turned },
    mark,
  );
}

/**
 * A triangle on the axis, up for a load and down for an unload; a cross where memory ran out.
 * @param {Snug.Event} event @param {number} x
 */
function eventMark(event, x) {
  const y = TOP + AREA;
  const paths = {
    load: `M${x},${y - 7}l4,7h-8Z`,
    unload: `M${x},${y}l4,-7h-8Z`,
    oom: `M${x - 4},${y - 8}l8,8m0,-8l-8,8`,
    retry: `M${x - 3},${y - 4}h6`,
  };
  const mark = svg("path", {
    class: `snug-event snug-event-${event.kind}`,
    d: paths[event.kind],
    "data-event": event.kind,
  });
  return svg("g", {}, svg("title", {}, tellEvent(event)), mark);
}

/** @param {Snug.Event} event */
export function tellEvent({ kind, model, device, bytes: size, node }) {
  const where = `${device ? ` on ${device}` : ""}${node ? ` in ${node}` : ""}`;
  switch (kind) {
    case "load":
      return `${model ?? "A model"} loaded, ${bytes(size ?? 0)}${where}`;
    case "unload":
      return `${model ?? "A model"} unloaded, ${bytes(size ?? 0)}${where}`;
    case "oom":
      return `Memory ran out${where}`;
    case "retry":
      return `PyTorch gave back its cache to find memory${where}`;
  }
}

/** @param {number} top @param {(bytes: number) => number} y @param {number} right */
function grid(top, y, right) {
  return byteTicks(top, 4).flatMap((value) => [
    svg("line", { class: "snug-grid", x1: LEFT, x2: right, y1: y(value), y2: y(value) }),
    svg("text", { class: "snug-axis", x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, axisBytes(value)),
  ]);
}

/** @param {Shown} now @param {import("../layout.mjs").TimeScale} scale */
function times(now, scale) {
  const most = Math.max(2, Math.floor(scale.x(now.end) / 80));
  return timeTicks(now.end - now.start, most).map((offset) =>
    svg(
      "text",
      {
        class: "snug-axis",
        x: scale.x(now.start + offset),
        y: TOP + AREA + 13,
        "text-anchor": offset ? "middle" : "start",
      },
      `${Number(offset.toFixed(1))} s`,
    ),
  );
}

/**
 * @param {Snug.Node} node @param {Shown} now @param {import("../layout.mjs").TimeScale} scale
 * @param {(bytes: number) => number} y @param {number} right
 */
function peakMark(node, now, scale, y, right) {
  const peak = peakOf(node, now.device);
  const [first, last] = [scale.x(node.started), scale.x(node.ended ?? now.end)];
  const middle = (first + last) / 2;
  const height = y(peak);
  const letters = Math.floor((right - LEFT) / LETTER) - 14;
  const text = `peak ${bytes(peak)}: ${shorten(node.title, Math.max(8, letters))}`;
  const half = (text.length * LETTER) / 2;
  const x = Math.min(Math.max(middle, LEFT + half), Math.max(right - half, LEFT + half));
  return [
    svg("line", { class: "snug-peak-line", x1: first, x2: Math.max(last, first + 2), y1: height, y2: height }),
    svg("path", { class: "snug-peak-mark", d: `M${middle},${height - 1}l-5,-7h10Z` }),
    svg(
      "text",
      {
        class: "snug-peak-text",
        x,
        y: height - 11,
        "text-anchor": "middle",
        "data-peak": peak,
        "data-node-id": node.node_id,
      },
      text,
    ),
  ];
}

/** @param {Shown} now @param {Snug.Node | undefined} peakNode */
function describe(now, peakNode) {
  const where = now.isGpu ? now.device : "RAM";
  const peak = peakNode ? ` The peak is ${bytes(peakOf(peakNode, now.device))} in ${peakNode.title}.` : "";
  const nodes = now.nodes.length ? `, ${now.nodes.length} nodes` : "";
  return `Memory of ComfyUI on ${where} over ${seconds(now.end - now.start)}${nodes}.${peak} The table has the numbers.`;
}
