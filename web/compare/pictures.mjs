// @ts-check
/** Pictures of the server as elements and as pixels. */

import { h } from "../dom.mjs";
import { place } from "./geometry.mjs";

/** From so many screen pixels for one of the picture on, pixels are shown as squares. */
const SQUARES = 3;

/** @param {Comfy.Api} api @param {Snug.PictureFile} file @returns {string} */
export function urlOf(api, { filename, subfolder, type }) {
  const route = `/view?${new URLSearchParams({ filename, subfolder, type })}`;
  return api.apiURL ? api.apiURL(route) : `/api${route}`;
}

/** @param {import("./geometry.mjs").Size} size @param {string} alt @param {() => void} onMissing */
export function makeImage({ width, height }, alt, onMissing) {
  const style = `width: ${width}px; height: ${height}px`;
  return h("img", { class: "snug-content", alt, style, draggable: "false", decoding: "sync", onerror: onMissing });
}

/**
 * Puts an image or a canvas where the view wants it.
 * @param {HTMLElement} content @param {import("./geometry.mjs").View} view
 * @param {import("./geometry.mjs").Size} pane @param {import("./geometry.mjs").Size} picture
 */
export function putContent(content, view, pane, picture) {
  const { scale, left, top } = place(view, pane, picture);
  content.style.transform = `translate(${left}px, ${top}px) scale(${scale})`;
  content.style.imageRendering = scale >= SQUARES ? "pixelated" : "auto";
}

/** @param {string} url @param {import("./geometry.mjs").Size} size @returns {Promise<ImageData>} of that size */
export async function pixelsOf(url, { width, height }) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = h("canvas", { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error("The browser has no canvas.");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, width, height);
}
