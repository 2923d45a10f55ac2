import assert from "node:assert/strict";
import test from "node:test";
import { axisBytes, bytes, clock, percent, plural, seconds, shorten } from "../../../web/telemetry/format.mjs";

const [MB, GB] = [2 ** 20, 2 ** 30];

test("sizes are what the server's report says", () => {
  const cases = [0, 1, MB - 1, MB, 1.6 * MB, 1023 * MB, GB, 6.207 * GB, 99.99 * GB, 640 * GB];
  assert.deepEqual(cases.map(bytes), [
    "0 MB",
    "<1 MB",
    "<1 MB",
    "1 MB",
    "2 MB",
    "1023 MB",
    "1.00 GB",
    "6.21 GB",
    "99.99 GB",
    "640 GB",
  ]);
  assert.equal(bytes(-2 * GB), "−2.00 GB");
});

test("an axis has no needless digits", () => {
  assert.deepEqual([0, 512 * MB, GB, 1.5 * GB].map(axisBytes), ["0 MB", "512 MB", "1 GB", "1.5 GB"]);
});

test("durations", () => {
  const cases = [-1, 0.004, 9.99, 9.996, 59.94, 59.96, 61, 3599, 3600, 7260];
  assert.deepEqual(cases.map(seconds), [
    "0.00 s",
    "0.00 s",
    "9.99 s",
    "10.0 s",
    "59.9 s",
    "1 min 00 s",
    "1 min 01 s",
    "59 min 59 s",
    "1 h 00 min",
    "2 h 01 min",
  ]);
});

test("shares", () => {
  assert.deepEqual([percent(1, 3), percent(1, 1000), percent(0, 5), percent(5, 0)], ["33%", "<1%", "0%", ""]);
});

test("times of day are of two digits each", () => {
  assert.match(clock(0), /^\d\d:\d\d:00$/);
});

test("words", () => {
  assert.deepEqual(
    [plural(1, "node"), plural(0, "node"), plural(2, "entry", "entries")],
    ["1 node", "0 nodes", "2 entries"],
  );
  assert.deepEqual([shorten("KSampler", 8), shorten("KSampler", 5), shorten("ab", 0)], ["KSampler", "KSam…", "…"]);
});
