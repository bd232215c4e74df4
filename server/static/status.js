// The state of the server: ready, compiling, waiting, or no answer.

import { at } from "./dom.js";
import { compilation } from "./verdict.js";

function say(state, text) {
  at("health").dataset.state = state;
  at("health").textContent = text;
}

/** Shows that a model is ready, and its compilation. */
export function sayReady(model) {
  say("ready", ["ready", compilation(model)].filter(Boolean).join(", "));
}

/** Shows the reason why the page waits. */
export const sayWaiting = (text) => say("waiting", text);

/** Shows that metrics cannot be read; the server may answer other requests. Null removes the message. */
export function sayNoMetrics(error) {
  at("metrics-error").textContent = error ? `${error.message}.` : "";
  at("metrics-error").hidden = !error;
  document.querySelector(".live").toggleAttribute("data-away", Boolean(error));
}

export const isAway = () => !at("away").hidden;

/** Greys out the answers from before the server stopped. */
export function sayAway() {
  say("away", "no answer");
  at("away").textContent = "The server does not answer. Trying again every second. The grey parts are from before.";
  at("away").hidden = false;
  document.querySelector("main").toggleAttribute("data-away", true);
}

export function sayBack() {
  at("away").hidden = true;
  document.querySelector("main").toggleAttribute("data-away", false);
}

/** Greys out the answers of these sides, which belong to an earlier r or photo. */
export const markStale = (sides) => (at("compare").dataset.stale = sides.map(({ name }) => name.toLowerCase()).join(" "));
