// @ts-check
/** The workflow on the canvas: finding the node of an execution id, and the files that its loaders will load. */

/** ComfyUI's node modes for nodes that do not run. */
const MUTED = 2;
const BYPASSED = 4;
/** Names of loaders' inputs, and the folder that their files lie in. @type {[RegExp, string][]} */
const FILE_INPUTS = [
  [/^unet_name$/, "diffusion_models"],
  [/^ckpt_name$/, "checkpoints"],
  [/^clip_name\d?$/, "text_encoders"],
];
/** The same for nodes whose input does not tell. @type {Record<string, [RegExp, string]>} */
const FILES_OF_NODES = {
  SnugLoadDiffusionModel: [/^model_name$/, "diffusion_models"],
  SnugLoadTextEncoders: [/^text_encoder_\d$/, "text_encoders"],
  SnugLoadCheckpoint: [/^checkpoint_name$/, "checkpoints"],
};

/** What combos of files offer where there are none, as nodes/adapter/folders.py has it. */
const NO_FILES = "no files in models/";

/** @param {Comfy.Graph} graph @returns {Comfy.Node[]} */
function nodesOf(graph) {
  return graph.nodes ?? graph._nodes ?? [];
}

/**
 * @param {Comfy.Graph} root @param {string} id such as "12", or "3:7:12" for a node inside of subgraphs; nodes that
 *   another node made as it ran ("12.0.4") stand for that node
 * @returns {{node: Comfy.Node, graph: Comfy.Graph} | null}
 */
export function findNode(root, id) {
  let graph = root;
  /** @type {Comfy.Node | undefined} */
  let node;
  for (const part of id.split(":")) {
    if (node) {
      if (!node.subgraph) return null;
      graph = node.subgraph;
    }
    const isNamed = (/** @type {string} */ name) => nodesOf(graph).find((other) => String(other.id) === name);
    node = isNamed(part) ?? isNamed(part.split(".")[0]);
    if (!node) return null;
  }
  return node ? { node, graph } : null;
}

/** Shows a node in the middle of the canvas. @param {Comfy.App} app @param {string} id @returns {Promise<boolean>} */
export async function focusNode(app, id) {
  const { canvas } = app;
  const root = app.rootGraph ?? app.graph;
  const found = root && findNode(root, id);
  if (!canvas || !found) return false;
  if (canvas.graph !== found.graph) {
    canvas.subgraph = found.graph === root ? undefined : found.graph;
    canvas.setGraph(found.graph);
    // The canvas takes over the other graph in its next frame.
    for (let frame = 0; frame < 2; frame++) await new Promise((resolve) => requestAnimationFrame(resolve));
  }
  canvas.selectNode?.(found.node);
  canvas.centerOnNode(found.node);
  canvas.setDirty(true, true);
  return true;
}

/**
 * The files that loaders in the workflow name, without those of nodes that do not run.
 * @param {Comfy.Graph} root @returns {Snug.FileChoice[]} each once
 */
export function filesToLoad(root) {
  /** @type {Map<string, Snug.FileChoice>} */
  const found = new Map();
  collect(root, found);
  return [...found.values()];
}

/** Once there are files, takes the first where a combo still says that there are none. @param {Comfy.Graph} graph */
export function chooseFirstFiles(graph) {
  for (const node of nodesOf(graph)) {
    if (node.subgraph) chooseFirstFiles(node.subgraph);
    for (const widget of node.widgets ?? []) {
      const offered = widget.options?.values;
      if (typeof widget.value !== "string" || !widget.value.startsWith(NO_FILES) || !Array.isArray(offered)) continue;
      if (offered.length && !offered.includes(widget.value)) widget.value = offered[0];
    }
  }
}

/** @param {Comfy.Graph} graph @param {Map<string, Snug.FileChoice>} found */
function collect(graph, found) {
  for (const node of nodesOf(graph)) {
    if (node.mode === MUTED || node.mode === BYPASSED) continue;
    if (node.subgraph) collect(node.subgraph, found);
    const named = FILES_OF_NODES[node.comfyClass ?? node.type ?? ""];
    for (const widget of node.widgets ?? []) {
      const [, folder] = [...(named ? [named] : []), ...FILE_INPUTS].find(([names]) => names.test(widget.name)) ?? [];
      const { value } = widget;
      if (folder && typeof value === "string" && value && value !== "none" && !value.startsWith(NO_FILES)) {
        found.set(`${folder}/${value}`, { folder, name: value });
      }
    }
  }
}
