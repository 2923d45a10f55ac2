// @ts-check
/** The page of a Blind Test node: pairs, votes and the result. The server knows which is which, and keeps the votes. */

import { h, set, setText } from "../dom.mjs";
import { RequestError, messageOf, post, request } from "../request.mjs";
import { detail, isRound, nextTrial, pictures, question, voteOf, voted } from "./blind_state.mjs";
import { addStageWidget, keepKeys, saveSoon } from "./node_element.mjs";
import { urlOf } from "./pictures.mjs";
import { Stage } from "./stage.mjs";
import { INITIAL, reduce } from "./state.mjs";
import { makeToolbar } from "./toolbar.mjs";

/** Of the node's properties, which are saved with the workflow. */
const PROPERTY = "snug_blind";
const ROUTE = "/snug/blind_test";
const KEYS = "1, 2 and 3 vote, G S B choose the mode, page up and down go through the pairs";
const EMPTY = "Run the workflow to begin.";
const GONE = "The images are no longer on the server: run the workflow with another round number.";
/** How long a button waits for the second click that makes it act. */
const DOUBT_MS = 4000;
/** @type {readonly import("./state.mjs").Mode[]} The difference would tell nothing of the side, and take long. */
const MODES = ["grid", "slider", "blink"];

/** @param {Comfy.Node} node @param {Comfy.App} app @param {Comfy.Api} api */
export function addBlindWidget(node, app, api) {
  /** @type {Snug.BlindRound | undefined} */ let round;
  /** @type {Snug.Comparison | undefined} */ let shown;
  let state = INITIAL;
  let trial = 0;
  let isBusy = false;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ let doubt;

  const stage = new Stage(dispatch, (file) => urlOf(api, file), {
    key,
    missing: () => stop(GONE),
    tell: () => {},
    keys: KEYS,
    detail: (side) => (round ? detail(round, trial, side) : ""),
  });
  const toolbar = makeToolbar(dispatch, { play: flip }, MODES);
  const message = h("p", { class: "snug-faint snug-message" }, EMPTY);
  const asked = h("p", { class: "snug-asked", role: "status", "data-snug": "question" });
  const result = h("p", { class: "snug-result", role: "status", "data-snug": "result" });
  const problem = h("p", { class: "snug-problem snug-notes", role: "alert" });
  const left = button("1: left", "The image on the left (key 1)", () => vote(1));
  const right = button("2: right", "The image on the right (key 2)", () => vote(2));
  const neither = button("3: cannot tell", "You cannot tell them apart (key 3)", () => vote(0));
  const back = button("◀", "The pair before (page up)", () => go(-1));
  const next = button("▶", "The next pair (page down)", () => go(1));
  const finish = button("Show result", "End the round with the votes so far", end);
  const copy = button("Copy result", "Copy the result as text", copyResult);
  const restart = button("Start again", "Forget the votes and shuffle anew", askThenRestart);
  const votes = h("div", { class: "snug-tools snug-votes" }, left, right, neither);
  const steps = h("div", { class: "snug-tools snug-votes" }, back, next, finish, copy, restart);
  const element = h(
    "div",
    { class: "snug-node snug-compare snug-blind widget-expands", "data-snug": "blind" },
    message,
    asked,
    toolbar.element,
    stage.element,
    result,
    votes,
    steps,
    problem,
  );
  keepKeys(element);
  addStageWidget(node, PROPERTY, element);
  draw();

  /** @param {import("./state.mjs").Action} action */
  function dispatch(action) {
    if (!shown) return;
    state = reduce(state, action, shown);
    draw();
  }

  function draw() {
    message.hidden = round !== undefined;
    for (const part of [asked, toolbar.element, stage.element, votes, steps]) part.hidden = !round;
    result.hidden = !round?.result;
    if (problem.textContent === "") problem.hidden = true;
    if (!round || !shown) return;
    setText(asked, question(round, trial));
    setText(result, round.result?.sentence ?? "");
    votes.hidden = round.finished;
    finish.hidden = round.finished;
    copy.hidden = !round.finished;
    const count = voted(round);
    [neither, left, right].forEach((one, value) => {
      set(one, { "aria-pressed": String(round?.votes[trial] === value) });
    });
    // Not `disabled`, which would take the focus away from what was just pressed.
    for (const one of [finish, restart]) set(one, { "aria-disabled": String(!count) });
    set(back, { "aria-disabled": String(!mayGo(-1)) });
    set(next, { "aria-disabled": String(!mayGo(1)) });
    toolbar.update(shown, state, false);
    stage.update(shown, state);
  }

  /** In the mode blink pictures change by hand: a rhythm would vote for nobody. */
  function flip() {
    stage.showSecond(!stage.secondIsUp);
  }

  /** @param {string} pressed @returns {boolean} */
  function key(pressed) {
    const chosen = voteOf(pressed);
    if (chosen !== null) vote(chosen);
    else if (pressed === "PageUp") go(-1);
    else if (pressed === "PageDown") go(1);
    else if (pressed === " " && state.mode === "blink") flip();
    else {
      const mode = MODES.find((name) => name[0] === pressed.toLowerCase());
      if (mode) dispatch({ type: "mode", mode });
      return mode !== undefined;
    }
    return true;
  }

  /** Whether there is such a pair: before the end none after the first without a vote. @param {number} by */
  function mayGo(by) {
    if (!round) return false;
    const last = round.finished ? round.trials.length - 1 : nextTrial(round);
    return trial + by >= 0 && trial + by <= last;
  }

  /** @param {number} by */
  function go(by) {
    if (mayGo(by)) show(trial + by);
  }

  /** @param {number} to */
  function show(to) {
    if (!round) return;
    trial = to;
    shown = pictures(round, trial);
    stage.showSecond(false);
    draw();
  }

  /** @param {Snug.Vote} chosen */
  async function vote(chosen) {
    if (!round || round.finished) return;
    const isNew = round.votes[trial] === null;
    const before = trial;
    if (!(await send("vote", { trial, vote: chosen })) || !round) return;
    if (!round.finished) show(isNew ? nextTrial(round) : Math.min(before + 1, nextTrial(round)));
  }

  /** @param {string} action @param {object} more @returns {Promise<boolean>} whether the server did it */
  async function send(action, more) {
    if (!round || isBusy) return false;
    const { round: id } = round;
    isBusy = true;
    try {
      const answer = await post(api, `${ROUTE}/${action}`, { round: id, ...more });
      if (round?.round !== id) return false; // another one began meanwhile
      take(answer);
      complain("");
      return true;
    } catch (error) {
      complain(messageOf(error));
      return false;
    } finally {
      isBusy = false;
      draw();
    }
  }

  function end() {
    if (round && voted(round)) send("finish", {});
  }

  async function askThenRestart() {
    if (!round || !voted(round)) return;
    if (doubt === undefined) {
      setText(restart, `Forget ${voted(round)} votes?`);
      doubt = setTimeout(settle, DOUBT_MS);
      return;
    }
    settle();
    if (await send("restart", {})) show(0);
  }

  function settle() {
    clearTimeout(doubt);
    doubt = undefined;
    setText(restart, "Start again");
  }

  async function copyResult() {
    if (!round?.result) return;
    try {
      await navigator.clipboard.writeText(round.result.sentence);
      setText(copy, "Copied");
      setTimeout(() => setText(copy, "Copy result"), DOUBT_MS);
    } catch {
      complain("The browser did not allow copying.");
    }
  }

  /** @param {string} text */
  function complain(text) {
    setText(problem, text);
    problem.hidden = !text;
  }

  /** @param {string} text */
  function stop(text) {
    round = shown = undefined;
    setText(message, text);
    draw();
  }

  /** What the server knows. @param {Snug.BlindRound} found */
  function take(found) {
    if (!isRound(found)) return;
    const isOther = found.round !== round?.round;
    const hasEnded = found.finished && !round?.finished;
    round = found;
    if (isOther) state = INITIAL;
    if (isOther || hasEnded) trial = hasEnded ? trial : nextTrial(found);
    trial = Math.min(trial, found.trials.length - 1);
    shown = pictures(found, trial);
    node.properties[PROPERTY] = found;
    // What had the focus may be gone now.
    if (hasEnded && element.contains(document.activeElement)) stage.element.focus({ preventScroll: true });
    saveSoon(app);
  }

  /** The votes may be newer on the server: results of a node are kept, and another page may have voted. */
  async function refresh() {
    if (!round) return;
    const { round: id } = round;
    try {
      const answer = await request(api, `${ROUTE}/round?${new URLSearchParams({ round: id })}`, { cache: "no-store" });
      if (round?.round !== id) return;
      take(answer);
      show(nextTrial(answer));
    } catch (error) {
      if (error instanceof RequestError && error.status === 404) stop(messageOf(error));
      else complain(messageOf(error));
    }
  }

  const { onExecuted, onConfigure, onRemoved } = node;
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    const found = output?.snug_blind?.[0];
    if (!isRound(found)) return;
    const { notes, ...rest } = found;
    take(rest);
    complain((notes ?? []).join(" "));
    draw();
    refresh();
  };
  node.onConfigure = function (data) {
    onConfigure?.call(this, data);
    const saved = node.properties[PROPERTY];
    if (!isRound(saved)) return;
    take(saved);
    draw();
    refresh();
  };
  node.onRemoved = function () {
    onRemoved?.call(this);
    settle();
  };
}

/** @param {string} text @param {string} title @param {() => void} act */
function button(text, title, act) {
  return h("button", { type: "button", class: "snug-button snug-small", title, onclick: act }, text);
}
