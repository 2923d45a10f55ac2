// @ts-check
/** Where pictures lie in their panes: one view for all, so that they zoom and move together. Pure. */

export const LARGEST_ZOOM = 64;
/** Of one step of the wheel, a key or a button. */
export const ZOOM_STEP = 1.25;

/**
 * zoom: 1 fits the picture into its pane. x, y: what lies in the middle of the pane, as fractions of the picture, so
 * that pictures of different sizes show the same part.
 * @typedef {{zoom: number, x: number, y: number}} View
 * @typedef {{width: number, height: number}} Size
 * @typedef {{scale: number, left: number, top: number}} Placement pixels of the pane for each pixel of the picture
 */

/** @type {View} */
export const WHOLE = Object.freeze({ zoom: 1, x: 0.5, y: 0.5 });

/** @param {View} view @param {Size} pane @param {Size} picture @returns {Placement} */
export function place(view, pane, picture) {
  const scale = view.zoom * Math.min(pane.width / picture.width, pane.height / picture.height);
  return {
    scale,
    left: pane.width / 2 - view.x * picture.width * scale,
    top: pane.height / 2 - view.y * picture.height * scale,
  };
}

/**
 * What of the picture lies at a point of the pane.
 * @param {Placement} at @param {Size} picture @param {number} left @param {number} top
 */
export function fractionAt(at, picture, left, top) {
  return {
    x: (left - at.left) / (picture.width * at.scale),
    y: (top - at.top) / (picture.height * at.scale),
  };
}

/**
 * Keeps what is at `point` where it is.
 * @param {View} view @param {number} factor @param {{x: number, y: number}} [point] @returns {View}
 */
export function zoomed(view, factor, point = view) {
  const zoom = clamp(view.zoom * factor, 1, LARGEST_ZOOM);
  const kept = view.zoom / zoom;
  return inside({ zoom, x: point.x + (view.x - point.x) * kept, y: point.y + (view.y - point.y) * kept });
}

/** @param {View} view @param {number} right fractions of the picture @param {number} down @returns {View} */
export function moved(view, right, down) {
  return inside({ ...view, x: view.x + right, y: view.y + down });
}

/** The picture never leaves its pane. @param {View} view @returns {View} */
function inside(view) {
  const half = 0.5 / view.zoom;
  return { zoom: view.zoom, x: clamp(view.x, half, 1 - half), y: clamp(view.y, half, 1 - half) };
}

/**
 * The number of columns in which pictures are largest.
 * @param {number} count @param {Size} stage @param {Size} picture @param {number} below pixels under each picture
 */
export function columns(count, stage, picture, below) {
  let best = 1;
  let largest = 0;
  for (let number = 1; number <= count; number++) {
    const height = stage.height / Math.ceil(count / number) - below;
    const scale = Math.min(stage.width / number / picture.width, height / picture.height);
    if (scale > largest * 1.001) [best, largest] = [number, scale];
  }
  return best;
}

/** @param {number} value @param {number} least @param {number} most */
export function clamp(value, least, most) {
  return Math.min(Math.max(value, least), most);
}
