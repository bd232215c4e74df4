// One request at a time, whoever asks; each asker's last wish is the one that is always answered.

/** Runs jobs one after another. A newer job of the same asker replaces a waiting one, and cuts short a slow one. */
export class Turns {
  #waiting = new Map();
  #running = null;
  #patienceMs;

  constructor(patienceMs = 250) {
    this.#patienceMs = patienceMs;
  }

  /** Queues `job(signal)`; it must not reject. */
  ask(asker, job) {
    this.#waiting.set(asker, job);
    const running = this.#running;
    if (running?.asker === asker) {
      // A quick answer to a passing value is worth showing; a slow one is not worth waiting for.
      running.timer ??= setTimeout(() => running.controller.abort(), this.#patienceMs);
    }
    if (!running) this.#run();
  }

  async #run() {
    while (this.#waiting.size) {
      const [asker, job] = this.#waiting.entries().next().value;
      this.#waiting.delete(asker);
      this.#running = { asker, controller: new AbortController(), timer: null };
      await job(this.#running.controller.signal);
      clearTimeout(this.#running.timer);
    }
    this.#running = null;
  }
}
