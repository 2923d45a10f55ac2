/** The connection, with a clock that the tests turn; requests go to a real server where they are what is tested. */

import assert from "node:assert/strict";
import { createServer } from "node:http";
import test from "node:test";
import { RequestError } from "../../../web/request.mjs";
import { EVENT, TelemetryClient } from "../../../web/telemetry/client.mjs";
import { Store } from "../../../web/telemetry/store.mjs";
import { history, prompt, sample } from "./records.mjs";

class Clock {
  now = 0;
  /** @type {Map<number, {at: number, call: () => void}>} */ timers = new Map();
  #last = 0;

  /** @param {() => void} call @param {number} ms */
  setTimeout(call, ms) {
    this.timers.set(++this.#last, { at: this.now + ms, call });
    return this.#last;
  }

  /** @param {number} timer */
  clearTimeout(timer) {
    this.timers.delete(timer);
  }

  /** Lets so many seconds pass, and all that happens meanwhile. @param {number} duration */
  async pass(duration) {
    const end = this.now + 1000 * duration;
    await settled();
    for (;;) {
      const due = [...this.timers].filter(([, { at }]) => at <= end).sort(([, one], [, other]) => one.at - other.at)[0];
      if (!due) break;
      this.timers.delete(due[0]);
      this.now = due[1].at;
      due[1].call();
      await settled();
    }
    this.now = end;
  }
}

/** All that does not wait for a timer is done. */
async function settled() {
  for (let turn = 0; turn < 5; turn++) await new Promise((resolve) => setImmediate(resolve));
}

/** ComfyUI's api: a server with `answers`, and messages that `send` makes. */
class FakeApi {
  clientId = "me";
  /** @type {{route: string, body: any}[]} */ requests = [];
  /** @type {Map<string, Set<(event: any) => void>>} */ listeners = new Map();
  history = history();
  /** @type {number | "away"} */ leaseStatus = 200;

  /** @param {string} route @param {RequestInit} [options] */
  async fetchApi(route, options) {
    this.requests.push({ route, body: options?.body ? JSON.parse(String(options.body)) : null });
    if (this.leaseStatus === "away") throw new TypeError("Failed to fetch");
    if (route.endsWith("/lease")) return new Response('{"error": "No."}', { status: this.leaseStatus });
    return Response.json(this.history);
  }

  /** @param {string} type @param {(event: any) => void} listener */
  addEventListener(type, listener) {
    this.listeners.set(type, (this.listeners.get(type) ?? new Set()).add(listener));
  }

  /** @param {string} type @param {(event: any) => void} listener */
  removeEventListener(type, listener) {
    this.listeners.get(type)?.delete(listener);
  }

  /** @param {string} type @param {unknown} [detail] */
  send(type, detail) {
    for (const listener of this.listeners.get(type) ?? []) listener({ detail });
  }

  /** @param {string} end @returns {any[]} bodies of requests to a route with this end, and forgets them */
  take(end) {
    const found = this.requests.filter(({ route }) => route.includes(end));
    this.requests = this.requests.filter(({ route }) => !route.includes(end));
    return found.map(({ route, body }) => body ?? route);
  }
}

function setUp() {
  const [api, clock, store] = [new FakeApi(), new Clock(), new Store()];
  return { api, clock, store, client: new TelemetryClient(api, store.dispatch, clock) };
}

/** @param {number} since @param {number} [end] */
const asked = (since, end = 0) => `/snug/telemetry/history?since=${since}&ended_after=${end}`;

const LEASE = { client_id: "me", seconds: 15, push: true };

test("nothing happens before somebody looks, nor after the last one does", async () => {
  const { api, clock, client, store } = setUp();
  await clock.pass(60);
  assert.deepEqual([api.requests, api.listeners.size, clock.timers.size], [[], 0, 0]);
  const releases = [client.watch(), client.watch()];
  await clock.pass(1);
  assert.equal(store.state.connection, "live");
  releases[0]();
  releases[0]();
  assert.equal(client.isOpen, true);
  api.requests = [];
  releases[1]();
  await clock.pass(60);
  assert.deepEqual(
    api.requests.map(({ body }) => body),
    [{ client_id: "me", seconds: 0, push: false }],
  );
  assert.deepEqual([clock.timers.size, [...api.listeners.values()].every((found) => !found.size)], [0, true]);
  assert.equal(store.state.connection, "off");
});

test("the listener is there before the lease, which is renewed in time", async () => {
  const { api, clock, client } = setUp();
  const fetchApi = api.fetchApi.bind(api);
  api.fetchApi = (route, options) => {
    assert.ok(api.listeners.get(EVENT)?.size);
    return fetchApi(route, options);
  };
  client.watch();
  await clock.pass(31);
  const leases = api.take("/lease");
  assert.equal(leases.length, 7);
  assert.deepEqual(leases[0], LEASE);
  assert.deepEqual(api.take("/history"), [asked(0)]);
});

test("closing and opening again while a request is under way leaves one lease and one set of timers", async () => {
  const { api, clock, client, store } = setUp();
  client.watch()();
  const release = client.watch();
  await clock.pass(1);
  assert.equal(store.state.connection, "live");
  api.take("/lease");
  await clock.pass(20);
  assert.equal(api.take("/lease").length, 4);
  release();
  await clock.pass(1);
  assert.equal(clock.timers.size, 0);
});

test("a lease that is granted after closing is given back", async () => {
  const { api, clock, client } = setUp();
  client.watch()();
  await clock.pass(1);
  assert.deepEqual(
    api.take("/lease").map(({ seconds }) => seconds),
    [15, 0],
  );
});

test("while a prompt runs its nodes are asked for, soon after one began and every few seconds", async () => {
  const { api, clock, client, store } = setUp();
  client.watch();
  await clock.pass(1);
  api.take("/history");
  api.history = history({ running: prompt("p", { ended: null }), samples: [sample(6)] });
  api.send(EVENT, sample(5, { running: "KSampler #1" }));
  await clock.pass(0.9);
  assert.deepEqual(api.take("/history"), []);
  await clock.pass(0.2);
  assert.deepEqual(api.take("/history"), [asked(5)]);
  for (let number = 7; number < 12; number++) api.send(EVENT, sample(number, { running: "VAE Decode #2" }));
  await clock.pass(4.5);
  assert.deepEqual(api.take("/history"), [asked(11), asked(11)]);
  assert.equal(store.state.running?.prompt_id, "p");
  api.history = history({ prompts: [prompt("p", { ended: 1010.5 })] });
  await clock.pass(10);
  assert.equal(api.take("/history").length, 1);
  assert.equal(store.state.running, null);
  client.refresh();
  await clock.pass(1);
  assert.deepEqual(api.take("/history"), [asked(11, 1010.5)]);
});

test("what happens while a request is under way is asked for again", async () => {
  const { api, clock, client, store } = setUp();
  client.watch();
  await clock.pass(1);
  /** @type {() => void} */
  let answer = () => {};
  const fetchApi = api.fetchApi.bind(api);
  api.fetchApi = async (route, options) => {
    const early = await fetchApi(route, options);
    if (route.includes("/history")) await new Promise((resolve) => (answer = () => resolve(null)));
    return early;
  };
  client.refresh();
  await clock.pass(0.5);
  api.fetchApi = fetchApi;
  api.history = history({ prompts: [prompt("p")] });
  api.send("status");
  await clock.pass(0.5);
  answer();
  await clock.pass(0.5);
  assert.equal(store.state.prompts.length, 1);
});

test("a change of the queue is looked at once", async () => {
  const { api, clock, client } = setUp();
  client.watch();
  await clock.pass(1);
  api.take("/history");
  for (let time = 0; time < 5; time++) api.send("status");
  client.refresh();
  await clock.pass(5);
  assert.equal(api.take("/history").length, 1);
});

test("a server that refuses or is away is asked less and less often", async () => {
  const { api, clock, client, store } = setUp();
  api.leaseStatus = 400;
  client.watch();
  await clock.pass(0);
  assert.deepEqual([store.state.connection, store.state.problem], ["waiting", "No."]);
  api.leaseStatus = "away";
  await clock.pass(120);
  assert.equal(store.state.problem, "ComfyUI does not answer.");
  assert.equal(api.take("/lease").length, 8); // after 1, 3, 7, 15, 31, 61 and 91 s
  api.leaseStatus = 200;
  await clock.pass(30);
  assert.deepEqual([store.state.connection, store.state.problem], ["live", ""]);
});

test("the page says so where the server has no telemetry", async () => {
  const { api, clock, client, store } = setUp();
  api.fetchApi = async () => new Response("404: Not Found", { status: 404 });
  client.watch();
  await clock.pass(0);
  assert.equal(store.state.connection, "unavailable");
  assert.match(store.state.problem, /restart it/);
});

test("after a restart of the server all is asked anew, with the new name", async () => {
  const { api, clock, client, store } = setUp();
  api.history = history({ samples: [sample(500)] });
  client.watch();
  await clock.pass(1);
  api.send("reconnecting");
  assert.equal(store.state.connection, "waiting");
  api.requests = [];
  await clock.pass(60);
  assert.deepEqual([api.requests, clock.timers.size], [[], 0]);
  api.clientId = "new";
  api.history = history({ samples: [sample(1), sample(2)] });
  api.send("reconnected");
  await clock.pass(1);
  assert.equal(api.take("/lease")[0].client_id, "new");
  assert.deepEqual(
    store.state.samples.map(({ number }) => number),
    [1, 2],
  );
});

test("a server that counts anew is noticed without a lost connection", async () => {
  const { api, clock, client, store } = setUp();
  api.history = history({ samples: [sample(500)] });
  client.watch();
  await clock.pass(1);
  api.history = history({ samples: [sample(1), sample(2)] });
  api.send(EVENT, sample(2));
  await clock.pass(1);
  assert.deepEqual(
    store.state.samples.map(({ number }) => number),
    [1, 2],
  );
});

test("answers of a real server: what it explains, what it has not, and what is no JSON", async () => {
  const server = createServer((request, response) => {
    const [status, body] = request.url === "/explained" ? [400, '{"error": "Too long."}'] : [405, "<html>"];
    response.writeHead(status).end(body);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", () => resolve(null)));
  const { port } = /** @type {import("node:net").AddressInfo} */ (server.address());
  const { api, client } = setUp();
  api.fetchApi = (route, options) => fetch(`http://127.0.0.1:${port}${route}`, options);
  const refusal = (/** @type {string} */ route) => client.post(route, {}).then(assert.fail, (error) => error);
  try {
    const explained = await refusal("/explained");
    assert.ok(explained instanceof RequestError);
    assert.deepEqual([explained.message, explained.status, explained.isMissing], ["Too long.", 400, false]);
    const missing = await refusal("/missing");
    assert.deepEqual([missing.message, missing.isMissing], ["ComfyUI answered with status 405.", true]);
  } finally {
    server.close();
    server.closeAllConnections();
  }
  assert.equal((await refusal("/explained")).message, "ComfyUI does not answer.");
});
