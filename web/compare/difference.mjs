// @ts-check
/** How much two pictures differ, pixel by pixel, and that as colours. Pure. */

/**
 * pixels: for each pixel the largest difference of its channels, 0 to 255. largest, mean, share: of 1.
 * @typedef {{pixels: Uint8Array, largest: number, mean: number, share: number}} Difference
 */

/** Colours from no difference to a large one: brighter is more, so that they need not be told apart by hue. */
const STOPS = [
  [0, 0, 4],
  [66, 10, 104],
  [147, 38, 103],
  [221, 81, 58],
  [252, 165, 10],
  [252, 255, 164],
];

/** @param {Uint8ClampedArray} a RGBA @param {Uint8ClampedArray} b as long @returns {Difference} */
export function differenceOf(a, b) {
  if (a.length !== b.length) throw new Error("The pictures differ in size.");
  const pixels = new Uint8Array(a.length / 4);
  let [largest, sum, count] = [0, 0, 0];
  for (let pixel = 0, at = 0; pixel < pixels.length; pixel++, at += 4) {
    const most = Math.max(
      Math.abs(a[at] - b[at]),
      Math.abs(a[at + 1] - b[at + 1]),
      Math.abs(a[at + 2] - b[at + 2]),
    );
    pixels[pixel] = most;
    sum += most;
    if (most > 0) count += 1;
    if (most > largest) largest = most;
  }
  const all = pixels.length || 1;
  return { pixels, largest: largest / 255, mean: sum / all / 255, share: count / all };
}

/** @param {Difference} difference @param {number} gain @returns {Uint8ClampedArray<ArrayBuffer>} RGBA */
export function heatMap({ pixels }, gain) {
  const colours = new Uint8ClampedArray(256 * 4);
  for (let value = 0; value < 256; value++) colours.set(colourOf((value / 255) * gain), 4 * value);
  const found = new Uint8ClampedArray(pixels.length * 4);
  // Four bytes at once.
  const [table, target] = [new Uint32Array(colours.buffer), new Uint32Array(found.buffer)];
  for (let pixel = 0; pixel < pixels.length; pixel++) target[pixel] = table[pixels[pixel]];
  return found;
}

/** @param {number} value from 0 to 1, larger ones are as 1 @returns {[number, number, number, number]} */
export function colourOf(value) {
  const place = Math.min(Math.max(value, 0), 1) * (STOPS.length - 1);
  const below = Math.min(Math.floor(place), STOPS.length - 2);
  const part = place - below;
  const [red, green, blue] = STOPS[below].map((from, channel) => from + (STOPS[below + 1][channel] - from) * part);
  return [red, green, blue, 255];
}

/** For a legend. */
export function gradient() {
  return `linear-gradient(to right, ${STOPS.map((colour) => `rgb(${colour.join(" ")})`).join(", ")})`;
}
