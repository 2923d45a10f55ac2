import assert from "node:assert/strict";
import test from "node:test";
import { colourOf, differenceOf, heatMap } from "../../../web/compare/difference.mjs";
import { differenceText } from "../../../web/compare/wording.mjs";

const a = new Uint8ClampedArray([10, 20, 30, 255, 200, 200, 200, 255]);
const b = new Uint8ClampedArray([10, 20, 30, 255, 200, 149, 210, 255]);

test("the largest difference of a pixel's channels counts", () => {
  const found = differenceOf(a, b);
  assert.deepEqual([...found.pixels], [0, 51]);
  assert.deepEqual([found.largest, found.mean, found.share], [0.2, 0.1, 0.5]);
  assert.equal(differenceText(found), "Largest difference 20.0%, mean 10.0%; 50.0% of the pixels differ.");
  assert.equal(differenceText(differenceOf(a, a)), "No pixel differs.");
  assert.throws(() => differenceOf(a, b.subarray(4)), /size/);
});

test("equal pixels are dark, and the gain makes the others brighter", () => {
  const difference = differenceOf(a, b);
  const brightness = (/** @type {Uint8ClampedArray} */ map) => map[4] + map[5] + map[6];
  const [faint, strong] = [heatMap(difference, 1), heatMap(difference, 5)];
  assert.deepEqual([...faint.subarray(0, 4)], [0, 0, 4, 255]);
  assert.ok(brightness(faint) > 10 && brightness(strong) > 2 * brightness(faint));
  assert.deepEqual([...strong.subarray(4)], colourOf(1));
});

test("more is brighter", () => {
  const light = Array.from({ length: 21 }, (_, step) => {
    const [red, green, blue] = colourOf(step / 20);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  });
  assert.deepEqual(light, [...light].sort((one, other) => one - other));
  assert.deepEqual(colourOf(7), colourOf(1));
});
