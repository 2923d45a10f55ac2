// @ts-check
/** Numbers as people read them. Sizes are in units of 1024, as everywhere in ComfyUI. */

const MEGABYTE = 2 ** 20;
const GIGABYTE = 2 ** 30;

/** @param {number} count bytes @returns {string} such as "6.21 GB", "340 MB" */
export function bytes(count) {
  const size = Math.abs(count);
  const sign = count < 0 ? "−" : "";
  if (size >= 100 * GIGABYTE) return `${sign}${Math.round(size / GIGABYTE)} GB`;
  if (size >= GIGABYTE) return `${sign}${(size / GIGABYTE).toFixed(2)} GB`;
  if (size > 0 && size < MEGABYTE) return `${sign}<1 MB`;
  return `${sign}${Math.round(size / MEGABYTE)} MB`;
}

/** @param {number} count bytes @returns {string} short enough for an axis: "6 GB", "1.5 GB", "512 MB" */
export function axisBytes(count) {
  if (count >= GIGABYTE) return `${Number((count / GIGABYTE).toFixed(2))} GB`;
  return `${Number((count / MEGABYTE).toFixed(0))} MB`;
}

/** @param {number} duration seconds */
export function seconds(duration) {
  if (duration < 9.995) return `${Math.max(0, duration).toFixed(2)} s`;
  if (duration < 59.95) return `${duration.toFixed(1)} s`;
  const whole = Math.round(duration);
  const rest = String(whole % 60).padStart(2, "0");
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${rest} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
}

/** @param {number} part @param {number} whole @returns {string} "" where there is no whole */
export function percent(part, whole) {
  if (!(whole > 0)) return "";
  const share = (100 * part) / whole;
  return share > 0 && share < 1 ? "<1%" : `${Math.round(share)}%`;
}

/** @param {number} time seconds since the epoch @returns {string} "14:03:27", in the user's time zone */
export function clock(time) {
  const date = new Date(time * 1000);
  return [date.getHours(), date.getMinutes(), date.getSeconds()]
    .map((value) => String(value).padStart(2, "0"))
    .join(":");
}

/** @param {number} count @param {string} one @param {string} [many] @returns {string} "1 node", "3 nodes" */
export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

/** @param {string} text @param {number} longest letters, the mark of what is left out included */
export function shorten(text, longest) {
  return text.length <= longest ? text : `${text.slice(0, Math.max(0, longest - 1))}…`;
}
