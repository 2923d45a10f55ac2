// @ts-check
/** Requests to Snug's routes. */

/** A request that was refused or not answered. status: of HTTP, 0 without an answer. isExplained: by Snug's server. */
export class RequestError extends Error {
  /** @param {string} message @param {number} status @param {boolean} [isExplained] */
  constructor(message, status, isExplained = false) {
    super(message);
    this.status = status;
    this.isExplained = isExplained;
  }

  /** ComfyUI has no such route: it answers a POST to one with 405. */
  get isMissing() {
    return !this.isExplained && (this.status === 404 || this.status === 405);
  }
}

/**
 * @param {Comfy.Api} api @param {string} route @param {RequestInit} options
 * @returns {Promise<any>} Raises RequestError.
 */
export async function request(api, route, options) {
  let response;
  try {
    response = await api.fetchApi(route, options);
  } catch {
    throw new RequestError("ComfyUI does not answer.", 0);
  }
  const body = await response.text();
  /** @type {any} */
  let answer = null;
  try {
    answer = body ? JSON.parse(body) : null;
  } catch {
    // A page of an error, or of a proxy before ComfyUI.
  }
  if (!response.ok) {
    const text = answer?.error ?? `ComfyUI answered with status ${response.status}.`;
    throw new RequestError(String(text), response.status, Boolean(answer?.error));
  }
  return answer;
}

/** @param {Comfy.Api} api @param {string} route @param {unknown} body @returns {Promise<any>} Raises RequestError. */
export function post(api, route, body) {
  const headers = { "Content-Type": "application/json" };
  return request(api, route, { method: "POST", headers, body: JSON.stringify(body) });
}

/** @param {unknown} error */
export function messageOf(error) {
  return error instanceof Error ? error.message : String(error);
}
