// @ts-check
/** Numbers and pictures in words. Pure. */

/** @param {Snug.Picture} picture @param {number} number counted from 0 */
export function nameOf(picture, number) {
  return `${number + 1}. ${picture.caption}`;
}

/** @param {Snug.Score | undefined} score @returns {string} "PSNR 31.2 dB, SSIM 0.951"; "" where there is none */
export function scoreText(score) {
  if (!score) return "";
  if (score.identical) return "identical";
  const parts = [`PSNR ${(score.psnr ?? 0).toFixed(1)} dB`];
  if (score.ssim !== null) parts.push(`SSIM ${score.ssim.toFixed(3)}`);
  if (score.lpips !== null) parts.push(`LPIPS ${score.lpips.toFixed(3)}`);
  return parts.join(", ");
}

/** Under a picture. @param {Snug.Comparison} shown @param {number} number @param {number} index */
export function detailOf(shown, number, index) {
  if (number === 0) return "compared with";
  return scoreText(shown.pictures[number].scores[index]) || "another size";
}

/**
 * @param {Snug.Comparison} shown @param {number} first @param {number} second
 * @returns {string} "" when they have one size
 */
export function mismatch(shown, first, second) {
  const [one, other] = [shown.pictures[first], shown.pictures[second]];
  if (one.width === other.width && one.height === other.height) return "";
  const sizes = `${nameOf(one, first)} is ${size(one)} pixels, ${nameOf(other, second)} is ${size(other)}`;
  return `${sizes}: choose two of one size to see their difference.`;
}

/** @param {{width: number, height: number}} picture */
function size({ width, height }) {
  return `${width} × ${height}`;
}

/** @param {import("./difference.mjs").Difference} difference */
export function differenceText({ largest, mean, share }) {
  if (largest === 0) return "No pixel differs.";
  return `Largest difference ${percent(largest)}, mean ${percent(mean)}; ${percent(share)} of the pixels differ.`;
}

/** @param {number} part of 1 */
function percent(part) {
  if (part > 0 && part < 0.0005) return "<0.1%";
  return `${(100 * part).toFixed(1)}%`;
}

/** @param {number} zoom */
export function zoomText(zoom) {
  return `${zoom < 9.95 ? Number(zoom.toFixed(1)) : Math.round(zoom)}×`;
}
