// @ts-check
/** The nodes of a prompt as a table, which its headers sort. */

import { bytes, seconds } from "../format.mjs";
import { peakOf } from "../layout.mjs";
import { find, h, keyed, set, setText } from "../../dom.mjs";

/** Rows that are shown at first. */
const MOST = 100;

/**
 * @typedef {{name: string, help: string, value: (node: Snug.Node, device: string, now: number) => number | string,
 *   isDescending: boolean}} Column
 * @type {Column[]}
 */
const COLUMNS = [
  { name: "Node", help: "The node's title and id", value: (node) => node.title, isDescending: false },
  {
    name: "Peak",
    help: "The most that was in use while the node ran, with all that was there before",
    value: peakOf,
    isDescending: true,
  },
  {
    name: "Added",
    help: "The peak beside what was in use when the node started",
    value: (node, device) => node.added[device] ?? 0,
    isDescending: true,
  },
  {
    name: "Time",
    help: "How long the node ran",
    value: (node, _, now) => (node.ended ?? now) - node.started,
    isDescending: true,
  },
];

/** @param {{focus: (nodeId: string) => void}} actions */
export function makeNodes(actions) {
  let sortedBy = 1;
  let isDescending = true;
  let showsAll = false;
  /** @type {[Snug.Prompt | undefined, number]} */
  let shown = [undefined, 0];

  const buttons = COLUMNS.map((column, at) =>
    h("button", { type: "button", title: `${column.help}. Sorts the table.`, onclick: () => sortBy(at) }, column.name),
  );
  const headers = buttons.map((button) => h("th", { scope: "col" }, button));
  const body = h("tbody", {});
  const table = h("table", { class: "snug-nodes" }, h("thead", {}, h("tr", {}, ...headers)), body);
  const none = h("p", { class: "snug-faint" }, "Nodes appear here when a workflow runs.");
  const more = h("button", { type: "button", class: "snug-button", onclick: showAll });
  const element = h("div", {}, table, none, more);

  /** @param {number} at */
  function sortBy(at) {
    isDescending = at === sortedBy ? !isDescending : COLUMNS[at].isDescending;
    sortedBy = at;
    update(...shown);
  }

  function showAll() {
    showsAll = true;
    update(...shown);
  }

  /** @param {Snug.Prompt | undefined} prompt @param {number} now */
  function update(prompt, now) {
    if (prompt?.prompt_id !== shown[0]?.prompt_id) showsAll = false;
    shown = [prompt, now];
    const device = prompt?.device ?? "";
    const { value } = COLUMNS[sortedBy];
    const sorted = [...(prompt?.nodes ?? [])].sort((one, other) => {
      const [first, second] = [value(one, device, now), value(other, device, now)];
      const order = typeof first === "string" ? first.localeCompare(String(second)) : first - Number(second);
      return isDescending ? -order : order;
    });
    const highest = Math.max(1, ...sorted.map((node) => peakOf(node, device)));
    headers.forEach((header, at) => {
      set(header, { "aria-sort": at !== sortedBy ? "none" : isDescending ? "descending" : "ascending" });
    });
    set(table, { "aria-label": `Nodes by memory${device && device !== "cpu" ? ` on ${device}` : ""}` });
    keyed(
      body,
      showsAll ? sorted : sorted.slice(0, MOST),
      keyOf,
      (node) => makeRow(node, actions),
      (row, node) => updateRow(row, node, device, now, highest),
    );
    table.hidden = !sorted.length;
    none.hidden = sorted.length > 0;
    more.hidden = showsAll || sorted.length <= MOST;
    setText(more, `Show all ${sorted.length} nodes`);
  }
  return { element, update };
}

/** A node of a loop runs several times. @param {Snug.Node} node */
function keyOf(node) {
  return `${node.node_id} ${node.started}`;
}

/** @param {Snug.Node} node @param {{focus: (nodeId: string) => void}} actions */
function makeRow(node, actions) {
  return h(
    "tr",
    { "data-snug": "node-row", "data-node-id": node.node_id, onclick: () => actions.focus(node.node_id) },
    h(
      "th",
      { scope: "row" },
      h("button", { type: "button", class: "snug-link", title: `${node.title}\nShow this node` }, node.title),
      h("span", { class: "snug-state" }),
    ),
    h(
      "td",
      {},
      h("span", {}),
      h("div", { class: "snug-meter", "aria-hidden": "true" }, h("div", { class: "snug-peak" })),
    ),
    h("td", {}),
    h("td", {}),
  );
}

/**
 * @param {HTMLTableRowElement} row @param {Snug.Node} node @param {string} device @param {number} now
 * @param {number} highest
 */
function updateRow(row, node, device, now, highest) {
  const peak = peakOf(node, device);
  const added = node.added[device] ?? 0;
  const time = (node.ended ?? now) - node.started;
  set(row, { "data-bytes": peak, "data-added": added, "data-state": node.state });
  setText(find(row, ".snug-state"), node.state === "done" ? "" : ` ${node.state}`);
  setText(find(row, "td span"), bytes(peak));
  set(find(row, ".snug-peak"), { style: `width: ${((100 * peak) / highest).toFixed(1)}%` });
  setText(row.cells[2], bytes(added));
  setText(row.cells[3], seconds(time));
}
