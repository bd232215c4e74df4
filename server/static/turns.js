// One request at a time, whoever asks; each asker's last wish is the one that is always answered.

/** Runs jobs one after another. A newer job of the same asker replaces a waiting one, and cuts short a slow one. */
export class Turns {
  #waiting = new Map();
  #running = null;
  #patienceMs;

  constructor(patienceMs = 250) {
    this.#patienceMs = patienceMs;
  }

  /** Queues `job(signal)`. */
  ask(asker, job) {
    this.#waiting.set(asker, job);
    const running = this.#running;
    if (running?.asker === asker) {
      // A quick answer to a passing value is worth showing; a slow one is not worth waiting for.
      running.timer ??= setTimeout(() => running.controller.abort(), this.#patienceMs);
    }
    if (!running) this.#run();
  }

  /** Takes back what was asked for. */
  clear() {
    this.#waiting.clear();
    this.#running?.controller.abort();
  }

  async #run() {
    while (this.#waiting.size) {
      const [asker, job] = this.#waiting.entries().next().value;
      this.#waiting.delete(asker);
      this.#running = { asker, controller: new AbortController(), timer: null };
      try {
        await job(this.#running.controller.signal);
      } catch (error) {
        reportError(error); // ours to mend, and no reason to leave the others waiting
      }
      clearTimeout(this.#running.timer);
    }
    this.#running = null;
  }
}
