// The form that asks for an API key. It shows when the server refuses a request without one.

import { hasKey, keepKey } from "./api.js";
import { at } from "./dom.js";

/** Calls `onKey` for each key that is entered. */
export function listenForKeys(onKey) {
  at("key").addEventListener("submit", (event) => {
    event.preventDefault();
    keepKey(at("key-value").value.trim());
    at("key-value").value = "";
    at("key").hidden = true;
    onKey();
  });
}

/** Asks for a key after a 401 or 403. */
export function askForKey(problem) {
  const why = hasKey() ? "The server does not accept this key." : "This server asks for a key.";
  at("key-why").textContent = problem.status === 403 ? "Changes need the admin key." : why;
  at("key").hidden = false;
  at("key-value").focus();
}
