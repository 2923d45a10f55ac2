import assert from "node:assert/strict";
import test from "node:test";
import { INITIAL, fitted, isComparison, kept, reduce, restored } from "../../../web/compare/state.mjs";
import { detailOf, mismatch, scoreText, zoomText } from "../../../web/compare/wording.mjs";

/** @type {Snug.PictureFile} */
const file = { filename: "a.png", subfolder: "", type: "temp" };
const score = { identical: false, psnr: 31.234, ssim: 0.95123, lpips: null };

/** @param {string} caption @param {number} width @param {object[]} scores @returns {any} */
const picture = (caption, width, scores) => ({ caption, width, height: 100, scores, files: [file, file] });

/** @type {Snug.Comparison} */
const shown = { count: 2, notes: [], pictures: [picture("dense", 100, []), picture("Q8_0", 100, [score, score])] };

test("steps go round the batch", () => {
  const back = reduce(INITIAL, { type: "step", by: -1 }, shown);
  assert.equal(back.index, 1);
  assert.equal(reduce(back, { type: "step", by: 1 }, shown).index, 0);
});

test("values stay within their bounds", () => {
  assert.equal(reduce(INITIAL, { type: "split", split: 1.7 }, shown).split, 1);
  assert.equal(reduce(INITIAL, { type: "second", picture: 7 }, shown).second, 1);
  // Three flashes a second can harm people.
  assert.ok(reduce(INITIAL, { type: "interval", seconds: 0.01 }, shown).interval > 1 / 3);
  assert.equal(reduce(INITIAL, { type: "gain", gain: 1e9 }, shown).gain, 64);
});

test("other pictures keep what was chosen where it exists", () => {
  const state = { ...INITIAL, mode: /** @type {const} */ ("slider"), first: 1, second: 0, index: 1 };
  assert.deepEqual(fitted(state, shown), state);
  assert.deepEqual(fitted({ ...state, second: 5, index: 9 }, shown), { ...state, first: 0, second: 1, index: 1 });
});

test("what a workflow keeps comes back, and nothing else", () => {
  const state = reduce(reduce(INITIAL, { type: "mode", mode: "blink" }, shown), { type: "zoom", factor: 2 }, shown);
  const again = restored(JSON.parse(JSON.stringify(kept(state))));
  assert.equal(again.mode, "blink");
  assert.equal(again.view.zoom, 1);
  for (const bad of [null, 3, "x", { mode: "evil", first: -1, second: "2", interval: "fast", gain: NaN }]) {
    assert.deepEqual(restored(bad), INITIAL);
  }
});

test("only what the server sends is shown", () => {
  assert.ok(isComparison(JSON.parse(JSON.stringify(shown))));
  const outside = { ...shown, pictures: [{ ...picture("x", 1, []), files: [{ ...file, type: "output" }] }] };
  for (const bad of [null, {}, { ...shown, count: 0 }, { ...shown, pictures: [] }, outside]) {
    assert.ok(!isComparison(bad));
  }
});

test("numbers in words", () => {
  assert.equal(scoreText(score), "PSNR 31.2 dB, SSIM 0.951");
  assert.equal(scoreText({ ...score, ssim: null, lpips: 0.1 }), "PSNR 31.2 dB, LPIPS 0.100");
  assert.equal(scoreText({ identical: true, psnr: null, ssim: 1, lpips: null }), "identical");
  assert.equal(detailOf(shown, 0, 0), "compared with");
  const other = { ...shown, pictures: [...shown.pictures, picture("small", 50, [])] };
  assert.equal(detailOf(other, 2, 0), "another size");
  assert.equal(mismatch(other, 0, 1), "");
  assert.match(mismatch(other, 0, 2), /1\. dense is 100 × 100 pixels, 3\. small is 50 × 100/);
  assert.deepEqual([1, 2.44, 12.3].map(zoomText), ["1×", "2.4×", "12×"]);
});
