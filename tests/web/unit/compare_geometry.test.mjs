import assert from "node:assert/strict";
import test from "node:test";
import { LARGEST_ZOOM, WHOLE, columns, fractionAt, moved, place, zoomed } from "../../../web/compare/geometry.mjs";

const pane = { width: 200, height: 100 };
const picture = { width: 400, height: 400 };

test("a picture fits into its pane, in the middle", () => {
  assert.deepEqual(place(WHOLE, pane, picture), { scale: 0.25, left: 50, top: 0 });
});

test("what lies under the pointer stays there when one zooms, in panes and pictures of any size", () => {
  const sizes = [picture, { width: 64, height: 48 }];
  let view = zoomed(WHOLE, 4, { x: 0.4, y: 0.6 });
  for (const size of sizes) {
    const before = place(view, pane, size);
    const point = { x: 110, y: 40 };
    const under = fractionAt(before, size, point.x, point.y);
    const after = fractionAt(place(zoomed(view, 1.7, under), pane, size), size, point.x, point.y);
    assert.ok(Math.abs(after.x - under.x) < 1e-9 && Math.abs(after.y - under.y) < 1e-9);
  }
  // The same part of pictures of different sizes is in the middle.
  const middles = sizes.map((size) => fractionAt(place(view, pane, size), size, 100, 50));
  assert.ok(Math.abs(middles[0].x - middles[1].x) < 1e-9);
});

test("zoom and place stay inside the picture", () => {
  assert.deepEqual(zoomed(WHOLE, 0.1), WHOLE);
  assert.equal(zoomed(WHOLE, 1e9).zoom, LARGEST_ZOOM);
  assert.deepEqual(moved(WHOLE, 5, -5), WHOLE);
  const view = moved(zoomed(WHOLE, 2), 9, -9);
  assert.deepEqual(view, { zoom: 2, x: 0.75, y: 0.25 });
  assert.deepEqual(zoomed(view, 0.5), WHOLE);
});

test("as many columns as make the pictures largest", () => {
  const square = { width: 10, height: 10 };
  assert.equal(columns(3, { width: 900, height: 300 }, square, 0), 3);
  assert.equal(columns(3, { width: 300, height: 900 }, square, 0), 1);
  assert.equal(columns(4, { width: 400, height: 400 }, square, 0), 2);
  assert.equal(columns(2, { width: 400, height: 300 }, { width: 10, height: 2 }, 20), 1);
});
