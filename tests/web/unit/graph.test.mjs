import assert from "node:assert/strict";
import test from "node:test";
import { chooseFirstFiles, filesToLoad, findNode } from "../../../web/telemetry/graph.mjs";

/** @param {number} id @param {object} [more] @returns {any} */
const node = (id, more = {}) => ({ id, type: "Some", mode: 0, ...more });
/** @param {string} name @param {unknown} value */
const widget = (name, value) => ({ name, value });

const inner = { nodes: [node(3), node(12, { type: "UNETLoader", widgets: [widget("unet_name", "b.safetensors")] })] };
const middle = { _nodes: [node(7, { subgraph: inner })] };
/** @type {Comfy.Graph} */
const root = {
  nodes: [
    node(1, {
      comfyClass: "SnugLoadDiffusionModel",
      widgets: [widget("model_name", "a.gguf"), widget("compute_dtype", "auto")],
    }),
    node(2, { subgraph: middle }),
    node(4, {
      comfyClass: "SnugLoadTextEncoders",
      widgets: [widget("text_encoder_1", "t5.gguf"), widget("text_encoder_2", "none")],
    }),
    node(5, { type: "DualCLIPLoader", mode: 4, widgets: [widget("clip_name1", "bypassed.gguf")] }),
    node(6, { type: "CheckpointLoaderSimple", mode: 2, widgets: [widget("ckpt_name", "muted.safetensors")] }),
    node(8, { type: "UNETLoader", widgets: [widget("unet_name", "b.safetensors")] }),
    node(9, { type: "Other", widgets: [widget("model_name", "upscaler.pth")] }),
  ],
};

test("nodes are found in the workflow and inside of its subgraphs", () => {
  assert.equal(findNode(root, "4")?.graph, root);
  const found = findNode(root, "2:7:12");
  assert.deepEqual([found?.node.id, found?.graph === inner], [12, true]);
  assert.equal(findNode(root, "2:7.0.4")?.node.id, 7);
  for (const missing of ["99", "1:3", "2:7:99", "", "2:"]) assert.equal(findNode(root, missing), null);
});

test("files of loaders that run, each once", () => {
  assert.deepEqual(filesToLoad(root), [
    { folder: "diffusion_models", name: "a.gguf" },
    { folder: "diffusion_models", name: "b.safetensors" },
    { folder: "text_encoders", name: "t5.gguf" },
  ]);
});

test("a combo that had no files takes the first once there are some, and none is loaded before", () => {
  const nothing = "no files in models/diffusion_models";
  /** @param {unknown} value @param {string[]} values */
  const loader = (value, values) =>
    node(1, { comfyClass: "SnugLoadDiffusionModel", widgets: [{ name: "model_name", value, options: { values } }] });
  const still = loader(nothing, [nothing]);
  const filled = loader(nothing, ["a.gguf", "b.gguf"]);
  const chosen = loader("gone.gguf", ["a.gguf"]);
  const graph = { nodes: [still, chosen, node(2, { subgraph: { nodes: [filled] } })] };
  assert.deepEqual(filesToLoad(graph), [{ folder: "diffusion_models", name: "gone.gguf" }]);
  chooseFirstFiles(graph);
  const values = [still, filled, chosen].map((each) => each.widgets[0].value);
  assert.deepEqual(values, [nothing, "a.gguf", "gone.gguf"]);
});
