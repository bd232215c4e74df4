// Prometheus' text format, and what a page wants of it: what happened between two scrapes.

/** Samples as [name, labels, value]. */
export function parse(text) {
  const samples = [];
  for (const row of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(row);
    if (!found) continue;
    const labels = {};
    for (const [, key, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[key] = value;
    samples.push([found[1], labels, Number(found[3])]);
  }
  return samples;
}

/** One scrape, reduced to one model: images by r, the histogram of latency, images in flight, the version. */
export function read(text, model) {
  const scrape = { images: new Map(), latency: new Map(), inFlight: 0, version: null };
  const add = (map, key, value) => map.set(key, (map.get(key) ?? 0) + value);
  for (const [name, labels, value] of parse(text)) {
    if (name === "tome_in_flight_images") scrape.inFlight = value;
    else if (name === "tome_config_version") scrape.version = value;
    else if (labels.model !== model) continue;
    else if (name === "tome_images_total") add(scrape.images, labels.r, value);
    else if (name === "tome_request_duration_seconds_bucket") {
      add(scrape.latency, labels.le === "+Inf" ? Infinity : Number(labels.le), value);
    }
  }
  return scrape;
}

/** What a map of counters has grown by. A counter that fell has started anew. */
export function growth(before, after) {
  const grown = new Map();
  for (const [key, value] of after) {
    const old = before.get(key) ?? 0;
    grown.set(key, value < old ? value : value - old);
  }
  return grown;
}

/** A quantile of a cumulative histogram, straight between its bounds; null where it is empty. */
export function quantile(share, buckets) {
  const bounds = [...buckets.keys()].sort((a, b) => a - b);
  const all = bounds.length ? buckets.get(bounds.at(-1)) : 0;
  if (!all) return null;
  const wanted = share * all;
  let low = 0, below = 0;
  for (const bound of bounds) {
    const count = buckets.get(bound);
    if (count >= wanted) {
      if (bound === Infinity) return low;
      return count === below ? bound : low + ((bound - low) * (wanted - below)) / (count - below);
    }
    [low, below] = [bound, count];
  }
  return low;
}
