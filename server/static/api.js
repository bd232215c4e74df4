// The server's endpoints. Every failure is a Problem with a readable message.

const KEY = "tome-key";

/** The failure of a request, with the server's message if it sent one. */
export class Problem extends Error {
  constructor(message, { status = 0, code = "unreachable", retryAfterS = 1 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }

  /** Whether the same request may succeed later. */
  get passes() {
    return [0, 429, 503].includes(this.status);
  }
}

/** Whether a key is kept. */
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** Keeps an API key while this tab is open. */
export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("x-api-key", key);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && key && /[^\x00-\xff]/.test(key)) {
      throw new Problem("this key holds characters that no key can have", { status: 401, code: "unauthorized" });
    }
    throw new Problem("the server does not answer");
  }
  if (response.ok) return response;
  const said = await response.json().then((body) => body.error, () => null);
  throw new Problem(said?.message ?? `the server answers ${response.status}`, {
    status: response.status,
    code: said?.code ?? "http_error",
    retryAfterS: Number(response.headers.get("retry-after")) || 1,
  });
}

/** The models, the default first. */
export async function models() {
  return (await (await send("v1/models")).json()).models;
}

/** One model, with the ETag that a change of it needs. */
export async function model(name) {
  const response = await send(`v1/models/${encodeURIComponent(name)}`);
  return { ...(await response.json()), etag: response.headers.get("etag") };
}

/** Sets the deployment's r, unless it has changed since `etag`. Returns what the answer says of the model. */
export async function setR(name, r, etag) {
  const response = await send(`v1/models/${encodeURIComponent(name)}`, {
    method: "PATCH",
    headers: { "content-type": "application/json", "if-match": etag },
    body: JSON.stringify({ r }),
  });
  return { ...(await response.json()), name, etag: response.headers.get("etag") };
}

/** The measured curve of a model, or null if none was measured. */
export async function curve(name) {
  try {
    return await (await send(`v1/models/${encodeURIComponent(name)}/curve`)).json();
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

/** Asks about a photo; without an r the deployment's is used. `what` is "classify" or "explain". */
export async function ask(what, photo, name, r, signal) {
  const query = new URLSearchParams({ model: name });
  if (r !== null) query.set("r", r);
  const type = /^image\//.test(photo.type) ? photo.type : "application/octet-stream";
  const response = await send(`v1/${what}?${query}`, {
    method: "POST", headers: { "content-type": type }, body: photo, signal,
  });
  return response.json();
}

/** The text of /metrics. */
export async function metrics(signal) {
  return (await send("metrics", { signal })).text();
}
