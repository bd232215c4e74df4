// What the page says of the server: ready, compiling, waiting, or no answer.

import { at } from "./dom.js";
import { compilation } from "./verdict.js";

function say(state, text) {
  at("health").dataset.state = state;
  at("health").textContent = text;
}

/** Shows that a model is ready, and what is compiled for it meanwhile. */
export function sayReady(model) {
  say("ready", ["ready", compilation(model)].filter(Boolean).join(", "));
}

/** Shows what the page waits for. */
export const sayWaiting = (text) => say("waiting", text);

/** Shows that metrics cannot be read: the server may answer all other requests. */
export function sayNoMetrics(error) {
  at("metrics-error").textContent = error ? `${error.message}.` : "";
  at("metrics-error").hidden = !error;
  document.querySelector(".live").toggleAttribute("data-away", Boolean(error));
}

export const isAway = () => !at("away").hidden;

/** Greys out what the server said before it stopped. */
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

/** Greys out the answers of sides whose dial or photo has changed since. */
export const markStale = (sides) => (at("compare").dataset.stale = sides.map(({ name }) => name.toLowerCase()).join(" "));
