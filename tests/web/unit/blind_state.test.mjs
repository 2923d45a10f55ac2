import assert from "node:assert/strict";
import test from "node:test";
import { detail, isRound, nextTrial, pictures, question, voteOf, voted } from "../../../web/compare/blind_state.mjs";

/** @param {string} filename @returns {Snug.PictureFile} */
const file = (filename) => ({ filename, subfolder: "", type: "temp" });

/** @param {Partial<Snug.BlindRound>} [more] @returns {Snug.BlindRound} */
const round = (more = {}) => ({
  round: "20261128-201503-0123abcd",
  name: "Q4_K",
  file: "snug/blind_test/x.json",
  width: 64,
  height: 32,
  trials: [
    [file("a"), file("b")],
    [file("c"), file("d")],
    [file("b"), file("a")],
  ],
  votes: [null, null, null],
  finished: false,
  result: null,
  quantized: null,
  ...more,
});

test("pairs come one after the other, and those without a vote first", () => {
  assert.equal(nextTrial(round()), 0);
  assert.equal(nextTrial(round({ votes: [0, null, 1] })), 1);
  assert.equal(nextTrial(round({ votes: [1, 2, 0] })), 2);
  assert.equal(voted(round({ votes: [0, null, 1] })), 2);
});

test("the stage gets the pictures of one pair and no word of which is which", () => {
  const shown = pictures(round(), 1);
  assert.deepEqual(shown.pictures.map(({ caption, files }) => [caption, files[0].filename]), [
    ["left", "c"],
    ["right", "d"],
  ]);
  assert.equal(question(round(), 1), "Pair 2 of 3: which one is Q4_K?");
  assert.equal(detail(round({ votes: [2, null, null] }), 0, 1), "your vote");
  assert.equal(detail(round({ votes: [2, null, null] }), 0, 0), "");
});

test("at the end each pair says what was right", () => {
  const done = round({ finished: true, votes: [1, 0, null], quantized: [1, 2, 1] });
  assert.equal(question(done, 0), "Pair 1 of 3: Q4_K was on the left; you found it.");
  assert.equal(question({ ...done, votes: [2, 0, null] }, 0), "Pair 1 of 3: Q4_K was on the left; you chose the other.");
  assert.equal(question(done, 1), "Pair 2 of 3: Q4_K was on the right; you could not tell.");
  assert.equal(question(done, 2), "Pair 3 of 3: Q4_K was on the left; no vote.");
  assert.deepEqual([detail(done, 1, 0), detail(done, 1, 1)], ["reference", "Q4_K"]);
});

test("keys", () => {
  assert.deepEqual(["1", "2", "3", "0", "x"].map(voteOf), [1, 2, 0, null, null]);
});

test("only what the server sends is shown", () => {
  assert.ok(isRound(JSON.parse(JSON.stringify(round()))));
  /** @type {any[]} */
  const bad = [null, {}, round({ votes: [null] }), round({ trials: [] }), { ...round(), votes: [3, null, null] }];
  for (const value of bad) assert.ok(!isRound(value));
});
