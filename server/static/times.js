// Inference times of A and B, by the engine's clock. They are measured in turns, so that a slow spell affects both.

export const FEW = 5; // fewest times for a comparison of medians
export const MANY = 20;

/** Whether the same backend computed both, in the same precision. */
export const isSame = (one, other) => one?.backend === other?.backend && one?.precision === other?.precision;

/** Times of one setting, all computed by the same backend in the same precision. */
export class Times {
  #ms = [];
  before = null; // the result of the previous measurement
  by = null; // {backend, precision}

  /** Adds an answer's time. A change of the backend drops the times before it. */
  add({ computed_by, timings_ms }) {
    if (!isSame(this.by, computed_by)) this.clear();
    this.by = computed_by;
    this.#ms.push(timings_ms.inference);
  }

  /** Forgets all times, for another setting or photo. */
  clear() {
    this.#ms = [];
    this.before = this.by = null;
  }

  /** Begins a new measurement of the same setting. */
  restart() {
    this.before = this.now ?? this.before;
    this.#ms = [];
  }

  get count() {
    return this.#ms.length;
  }

  /** The result of this measurement, {ms, count}: the median and the number of times; null without any time. */
  get now() {
    return this.count ? { ms: median(this.#ms), count: this.count } : null;
  }
}

function median(numbers) {
  const sorted = numbers.toSorted((one, other) => one - other), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** The results of two settings to show: both of the new measurement once it has enough times, else of the previous. */
export function results(...both) {
  const isNew = both.every(({ count }) => count >= FEW) || both.some(({ before }) => !(before?.count >= FEW));
  return both.map(({ now, before }) => (isNew ? now ?? before : before));
}

/** The speed of the first setting divided by that of the second; null while they cannot be compared. */
export function gain(first, second) {
  const [one, other] = results(first, second);
  if (!isSame(first.by, second.by) || !(one?.count >= FEW && other?.count >= FEW)) return null;
  return other.ms / one.ms;
}

/** Measures two sides in turns: A, B, B, A, A, B and so on. */
export class Stopwatch {
  #turns;
  #sides;
  #onTime;
  #last;
  #run = 0; // the number of the measurement
  wanted = 0; // times of each side; 0 while nothing is measured

  /**
   * @param turns Runs one request at a time.
   * @param sides The two sides.
   * @param onTime Called after each time and at the end.
   */
  constructor(turns, sides, onTime) {
    this.#turns = turns;
    this.#sides = sides;
    this.#last = sides[0];
    this.#onTime = onTime;
  }

  /** Measures both sides again, at least `wanted` times each. */
  start(wanted) {
    const most = Math.max(this.wanted, wanted);
    this.stop();
    this.wanted = most;
    for (const side of this.#sides) side.times.restart();
    this.#next(this.#run);
  }

  stop() {
    this.#run += 1;
    this.wanted = 0;
  }

  #next(run) {
    const side = this.#due();
    if (!side) return this.#end();
    this.#turns.ask("times", async (signal) => {
      if (run !== this.#run) return;
      this.#last = side;
      const isTimed = await side.time(signal).catch(() => false); // other requests show the problem
      if (run !== this.#run) return;
      if (!isTimed) return this.#end();
      this.#onTime();
      this.#next(run);
    });
  }

  #end() {
    this.stop();
    this.#onTime();
  }

  /** The side that is measured next; null at the end. Sides that cannot be compared get one time each. */
  #due() {
    const [a, b] = this.#sides.map(({ times }) => times);
    const wanted = a.count && b.count && !isSame(a.by, b.by) ? 1 : this.wanted;
    if (Math.min(a.count, b.count) >= wanted) return null;
    if (a.count === b.count) return this.#last;
    return this.#sides[a.count < b.count ? 0 : 1];
  }
}
