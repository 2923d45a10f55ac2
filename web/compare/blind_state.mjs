// @ts-check
/** A round of a blind test as the page knows it. Pure. */

import { isFile } from "./state.mjs";

/** @type {readonly Snug.Vote[]} */
const VOTES = [0, 1, 2];
export const SIDES = ["left", "right"];

/** Whether a value is what the server sends. @param {any} value @returns {value is Snug.BlindRound} */
export function isRound(value) {
  return (
    typeof value?.round === "string" &&
    typeof value.name === "string" &&
    typeof value.file === "string" &&
    value.width > 0 &&
    value.height > 0 &&
    Array.isArray(value.trials) &&
    value.trials.length > 0 &&
    value.trials.every((/** @type {any} */ pair) => Array.isArray(pair) && pair.length === 2 && pair.every(isFile)) &&
    Array.isArray(value.votes) &&
    value.votes.length === value.trials.length &&
    value.votes.every((/** @type {any} */ vote) => vote === null || VOTES.includes(vote)) &&
    typeof value.finished === "boolean"
  );
}

/** The first pair without a vote; the last one when all have one. @param {Snug.BlindRound} round */
export function nextTrial({ votes }) {
  const found = votes.indexOf(null);
  return found < 0 ? votes.length - 1 : found;
}

/** @param {Snug.BlindRound} round */
export function voted({ votes }) {
  return votes.filter((vote) => vote !== null).length;
}

/**
 * For the stage: the two pictures of a pair.
 * @param {Snug.BlindRound} round @param {number} trial @returns {Snug.Comparison}
 */
export function pictures({ trials, width, height }, trial) {
  return {
    count: 1,
    notes: [],
    pictures: trials[trial].map((file, side) => ({ caption: SIDES[side], width, height, files: [file], scores: [] })),
  };
}

/** @param {Snug.BlindRound} round @param {number} trial @returns {string} what is asked, or what was right */
export function question(round, trial) {
  const place = `${trial + 1} of ${round.trials.length}`;
  if (!round.finished) return `Pair ${place}: which one is ${round.name}?`;
  return `Pair ${place}: ${answer(round, trial)}`;
}

/** @param {Snug.BlindRound} round @param {number} trial */
function answer({ votes, quantized, name }, trial) {
  const side = quantized?.[trial];
  const truth = side ? `${name} was on the ${SIDES[side - 1]}` : "";
  const vote = votes[trial];
  if (vote === null) return `${truth}; no vote.`;
  if (vote === 0) return `${truth}; you could not tell.`;
  return `${truth}; ${vote === side ? "you found it" : "you chose the other"}.`;
}

/** Below a picture. @param {Snug.BlindRound} round @param {number} trial @param {number} side 0 or 1 */
export function detail({ finished, quantized, votes, name }, trial, side) {
  if (!finished || !quantized) return votes[trial] === side + 1 ? "your vote" : "";
  return quantized[trial] === side + 1 ? name : "reference";
}

/** A key's vote. @param {string} key @returns {Snug.Vote | null} */
export function voteOf(key) {
  if (key === "1") return 1;
  if (key === "2") return 2;
  return key === "3" ? 0 : null;
}
