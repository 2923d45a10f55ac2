import assert from "node:assert/strict";
import test from "node:test";
import {
  areas,
  byteTicks,
  highest,
  lanes,
  partHelp,
  partName,
  PARTS,
  pointAt,
  segments,
  thin,
  timeScale,
  timeTicks,
  used,
} from "../../../web/telemetry/layout.mjs";
import { device, node, point } from "./records.mjs";

test("the parts of a bar are shares of the device, and make up all of it", () => {
  const found = segments(device());
  assert.deepEqual(
    found.map(({ part }) => part),
    ["weights", "activations", "cache", "other", "free"],
  );
  assert.equal(
    found.reduce((sum, { share }) => sum + share, 0),
    1,
  );
  assert.equal(found[0].share, 0.4);
});

test("a device of which nothing is known has no parts", () => {
  assert.deepEqual(segments(device({ total: 0, weights: 0, activations: 0, cache: 0, other: 0, free: 0 })), []);
});

test("PyTorch's cache is not in use", () => {
  assert.equal(used(device()), 600 * 2 ** 20);
});

test("every part has a name and an explanation, on a GPU and on a CPU", () => {
  for (const isGpu of [true, false]) {
    const texts = PARTS.flatMap((part) => [partName(part, isGpu), partHelp(part, isGpu)]);
    assert.equal(new Set(texts).size, 2 * PARTS.length);
  }
});

test("ticks are round, few, and never above the top", () => {
  for (const top of [1, 2 ** 20, 700 * 2 ** 20, 24 * 2 ** 30]) {
    const ticks = byteTicks(top, 4);
    assert.ok(ticks.length <= 5 && ticks[0] === 0 && (ticks.at(-1) ?? 0) <= top);
    assert.ok(ticks.every((value) => value % 2 ** 20 === 0));
  }
  assert.deepEqual(
    byteTicks(24 * 2 ** 30, 4),
    [0, 8, 16, 24].map((size) => size * 2 ** 30),
  );
  assert.deepEqual(timeTicks(10, 4), [0, 5, 10]);
  assert.deepEqual(timeTicks(0.05, 4), [0]);
  assert.ok(timeTicks(100000, 4).length <= 5);
});

test("a scale goes both ways and stays in its box", () => {
  const scale = timeScale(100, 110, 50, 250);
  assert.equal(scale.x(105), 150);
  assert.equal(scale.time(150), 105);
  assert.deepEqual([scale.x(0), scale.x(1000), scale.time(0), scale.time(999)], [50, 250, 100, 110]);
  assert.ok(Number.isFinite(timeScale(5, 5, 0, 100).x(5)));
});

test("peaks survive when there are more points than pixels", () => {
  const scale = timeScale(0, 1000, 0, 10);
  const points = Array.from({ length: 1000 }, (_, at) => point(at, at === 437 ? 9999 : 1));
  const kept = thin(points, scale);
  assert.ok(kept.length <= 11);
  assert.equal(Math.max(...kept.map(({ weights }) => weights)), 9999);
});

test("areas lie on top of one another, and empty ones are left out", () => {
  const scale = timeScale(0, 10, 0, 100);
  const box = { left: 0, right: 100, y: (/** @type {number} */ value) => 100 - value };
  const found = areas([point(0, 10, 5), point(10, 20, 5)], scale, box);
  assert.deepEqual(
    found.map(({ part }) => part),
    ["weights", "activations"],
  );
  assert.equal(found[0].path, "M0,90L0,90L100,80L100,80L100,100L100,100L0,100L0,100Z");
  assert.equal(found[1].path, "M0,85L0,85L100,75L100,75L100,80L100,80L0,90L0,90Z");
  assert.deepEqual(areas([], scale, box), []);
});

test("nodes that run one after the other share a lane, others do not", () => {
  const scale = timeScale(0, 100, 0, 1000);
  const nodes = [
    node("a", { started: 0, ended: 50 }),
    node("b", { started: 50, ended: 60 }),
    node("c", { started: 10, ended: 70 }),
    node("d", { started: 20, ended: null }),
  ];
  const { bars, left } = lanes(nodes, scale, 100, 2);
  assert.deepEqual(
    bars.map((bar) => [bar.node.node_id, bar.lane]),
    [
      ["a", 0],
      ["c", 1],
      ["b", 0],
    ],
  );
  assert.equal(left, 1);
  const last = lanes([nodes[3]], scale, 100, 2).bars[0];
  assert.deepEqual([last.x, last.width], [200, 800]);
  assert.equal(lanes([node("e", { started: 5, ended: 5 })], scale, 100, 1).bars[0].width, 2);
});

test("the point under the pointer is the last one before it", () => {
  const points = [point(0, 1), point(5, 2), point(9, 3)];
  assert.deepEqual(
    [-1, 0, 4.9, 5, 100].map((time) => pointAt(points, time).weights),
    [1, 1, 1, 2, 3],
  );
});

test("the highest peak is that of the device that is shown", () => {
  const nodes = [node("a", { peak: { cpu: 9, "cuda:0": 1 } }), node("b", { peak: { cpu: 1, "cuda:0": 2 } })];
  assert.equal(highest(nodes, "cuda:0")?.node_id, "b");
  assert.equal(highest(nodes, "cpu")?.node_id, "a");
  assert.equal(highest([], "cpu"), undefined);
});
