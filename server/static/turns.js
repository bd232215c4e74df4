// Runs one request at a time. The last job of each asker always runs.

/** Runs jobs one after another. A newer job of the same asker replaces a waiting one, and aborts a slow one. */
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
      // A quick answer to an old request is still shown; a slow one is aborted.
      running.timer ??= setTimeout(() => running.controller.abort(), this.#patienceMs);
    }
    if (!running) this.#run();
  }

  /** Whether a job of this asker waits. */
  isWaiting(asker) {
    return this.#waiting.has(asker);
  }

  /** Drops all jobs. */
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
        reportError(error); // an error of the page; the other jobs go on
      }
      clearTimeout(this.#running.timer);
    }
    this.#running = null;
  }
}
