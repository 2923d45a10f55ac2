// @ts-check
/** How an element with pictures sits in a node, in both of ComfyUI's renderers. */

/** Pixels; classic nodes leave the margin around the element. */
const HEIGHT = 340;
const MARGIN = 10;
const WIDTH = 440;
/** Of ComfyUI's own text boxes, which would otherwise take as much of a tall node as the pictures. */
const TEXT_BOX = 62;

/** @param {Comfy.Node} node @param {string} name @param {HTMLElement} element */
export function addStageWidget(node, name, element) {
  element.style.minHeight = `${HEIGHT}px`;
  const widget = node.addDOMWidget(name, name.toUpperCase(), element, {
    serialize: false, // not an input of the node
    hideOnZoom: true,
    getMinHeight: () => HEIGHT + 2 * MARGIN,
  });
  widget.serialize = false; // nor a value in the saved workflow
  for (const other of node.widgets ?? []) {
    if (other !== widget && other.element instanceof HTMLTextAreaElement && other.options) {
      other.options.getMinHeight = other.options.getMaxHeight = () => TEXT_BOX;
    }
  }
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, WIDTH), height]);
}

/**
 * The page's shortcuts (R, Q, delete …) must not act while somebody uses buttons of a node. What opens and closes
 * things of the page does. @param {HTMLElement} element
 */
export function keepKeys(element) {
  element.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.key === "Escape" || event.key === "Tab") return;
    event.stopPropagation();
  });
  // Moving a slider must not move the node.
  for (const type of ["pointerdown", "mousedown", "dblclick"]) {
    element.addEventListener(type, (event) => {
      if (event.target instanceof Element && event.target.closest("button, input, select, .snug-stage")) {
        event.stopPropagation();
      }
    });
  }
}

/** The page saves workflows when it notices a change, which it looks for after clicks on its own things only. */
const NOTICE_MS = 300;
/** @type {ReturnType<typeof setTimeout> | undefined} */
let noticing;

/** To be called when a node's properties have changed. @param {Comfy.App} app */
export function saveSoon(app) {
  clearTimeout(noticing);
  noticing = setTimeout(() => {
    app.extensionManager.workflow?.activeWorkflow?.changeTracker?.checkState?.();
  }, NOTICE_MS);
}
