// Shows the deployment's r, and sets it unless another client has changed it meanwhile.

import { setR } from "./api.js";
import { at, words } from "./dom.js";

/** The form that sets it. */
export class Deployment {
  #model = null;
  #shown = "";
  #events;
  #last = Promise.resolve(); // changes run one after the other, because each needs the ETag of the one before

  /** @param events rOfA(), onModel(changed) and reload(), which return the model, and onDenied(problem) */
  constructor(events) {
    this.#events = events;
    at("deployment").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    at("deployment-from-a").addEventListener("click", () => {
      at("deployment-r").value = events.rOfA();
      this.#ask();
    });
  }

  /** Shows a model's deployment. Typed text that is not set yet stays. */
  show(model) {
    const field = at("deployment-r"), untouched = field.value === this.#shown;
    this.#model = model;
    this.#shown = words(model.r);
    if (untouched) field.value = this.#shown;
  }

  /** Shows the deployment's r instead of the typed text. */
  #put(model) {
    at("deployment-r").value = this.#shown;
    this.show(model);
  }

  say(text, state = "") {
    at("deployment-says").textContent = text;
    at("deployment-says").dataset.state = state;
  }

  #ask() {
    const r = at("deployment-r").value.replaceAll(" ", "");
    this.#last = this.#last.then(() => this.#model && this.#set(r));
  }

  async #set(r) {
    const model = this.#model;
    try {
      const changed = await setR(model.name, r, model.etag);
      this.#put(this.#events.onModel(changed));
      this.say(`Every request that names no r now gets r = ${words(changed.r)}, and after a restart too.`, "good");
    } catch (problem) {
      if ([409, 412].includes(problem.status)) {
        const now = await this.#events.reload().catch(() => null);
        if (now) this.#put(now);
        const value = now ? `it is r = ${words(now.r)} now` : "and it cannot be read now";
        this.say(`Not set: somebody else changed it meanwhile, ${value}. Set it again if you still want to.`, "bad");
      } else {
        this.say(`Not set: ${problem.message}.`, "bad");
        if ([401, 403].includes(problem.status)) this.#events.onDenied(problem);
      }
    }
  }
}
