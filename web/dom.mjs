// @ts-check
/** Making and updating elements. Text is always set as text, never as HTML. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @typedef {Record<string, string | number | boolean | null | undefined | ((event: any) => void)>} Attributes
 *   of an element; "on…" are listeners, null, undefined and false leave one out
 * @typedef {Node | string | null | undefined | false} Child
 */

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag @param {Attributes} [attributes] @param {...Child} children @returns {HTMLElementTagNameMap[Tag]}
 */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/**
 * @template {keyof SVGElementTagNameMap} Tag
 * @param {Tag} tag @param {Attributes} [attributes] @param {...Child} children @returns {SVGElementTagNameMap[Tag]}
 */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** @template {Element} E @param {E} element @param {Attributes} attributes @param {Child[]} children */
function filled(element, attributes, children) {
  set(element, attributes);
  for (const child of children) if (child) element.append(child);
  return element;
}

/** Sets what differs. @param {Element} element @param {Attributes} attributes */
export function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === null || value === undefined || value === false) element.removeAttribute(name);
    else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, String(value));
  }
}

/** @param {Node} node @param {string} text */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Makes the children of `parent` those of `items` in their order. What is there already is kept, so that the focus and
 * the selection stay where they are.
 * @template Item
 * @param {Element} parent
 * @param {readonly Item[]} items
 * @param {(item: Item) => string} keyOf names of items, all different
 * @param {(item: Item) => Element} make
 * @param {(element: any, item: Item) => void} [update] also called for what was just made
 */
export function keyed(parent, items, keyOf, make, update) {
  const focused = document.activeElement;
  const before = new Map([...parent.children].map((child) => [child.getAttribute("data-key"), child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let element = before.get(key);
    before.delete(key);
    if (!element) {
      element = make(item);
      element.setAttribute("data-key", key);
    }
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
    update?.(element, item);
  }
  for (const element of before.values()) element.remove();
  // Browsers take the focus away from what is moved.
  if (focused instanceof HTMLElement && focused !== document.activeElement && parent.contains(focused)) {
    focused.focus({ preventScroll: true });
  }
}

/** @param {Element} root @param {string} selector @returns {HTMLElement} one that is known to be there */
export function find(root, selector) {
  const found = root.querySelector(selector);
  if (!(found instanceof HTMLElement)) throw new Error(`There is no ${selector}.`);
  return found;
}

let count = 0;

/** An id that no other element of the page has. @param {string} name */
export function freshId(name) {
  count += 1;
  return `snug-${name}-${count}`;
}

/**
 * A part of the panel with a heading that opens and closes it; browsers make that work with the keyboard.
 * @param {string} title @param {Attributes} attributes @param {...Child} children
 * @returns {HTMLDetailsElement}
 */
export function section(title, attributes, ...children) {
  const heading = h("summary", {}, h("span", { role: "heading", "aria-level": 3, class: "snug-title" }, title));
  return h("details", { class: "snug-section", open: "", ...attributes }, heading, ...children);
}
