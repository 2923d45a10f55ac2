import assert from "node:assert/strict";
import test from "node:test";
import { asCsv, asJson } from "../../../web/telemetry/export.mjs";
import { node, prompt, sample } from "./records.mjs";

test("CSV has a line for each node and device, with exact numbers", () => {
  const nodes = [
    node("1:2", { title: 'My "big", node #1:2', started: 1000.25, ended: 1001.5, peak: { "cuda:0": 300, cpu: 7 } }),
    node("3", { ended: null, state: "running" }),
  ];
  assert.deepEqual(asCsv(prompt("p", { nodes })).split("\n"), [
    "node_id,node,state,start_seconds,seconds,device,before_bytes,peak_bytes,after_bytes",
    '1:2,"My ""big"", node #1:2",done,0.250000,1.250000,cuda:0,100,300,200',
    '1:2,"My ""big"", node #1:2",done,0.250000,1.250000,cpu,0,7,0',
    "3,A node #3,running,0.000000,,cuda:0,100,300,200",
    "",
  ]);
});

test("JSON is the prompt with the newest sample", () => {
  const found = JSON.parse(asJson(prompt("p", { nodes: [node("1")] }), sample(4)));
  assert.equal(found.prompt_id, "p");
  assert.equal(found.nodes[0].peak["cuda:0"], 300);
  assert.equal(found.now.number, 4);
  assert.equal(JSON.parse(asJson(prompt("p"), undefined)).now, null);
});
