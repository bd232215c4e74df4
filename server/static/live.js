// The live view: one scrape a second while the page is visible.

import { metrics } from "./api.js";
import { at, draw, make } from "./dom.js";
import { growth, quantile, read } from "./prometheus.js";

const EVERY_MS = 1000, TIMEOUT_MS = 5000;
const LATENCY_OVER = 10, SHARE_OVER = 30, SPARK_OVER = 60; // scrapes

/** Polls the metrics of the chosen model. */
export class Live {
  #scrapes = []; // {at, images, latency, inFlight, version}, the oldest first
  #series = { rate: [], flight: [], p50: [], p95: [] };
  #model = null;
  #missing = null; // the status of the failure, while metrics cannot be read; 0 where nothing answers
  #events;

  /** @param events onAway(error), onBack(), and onVersion() when the configuration may have changed */
  constructor(events) {
    this.#events = events;
  }

  start() {
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.#scrapes = []; // no scrapes while hidden, so no rates
    });
    const loop = async () => {
      if (!document.hidden && this.#model) await this.#poll();
      setTimeout(loop, EVERY_MS);
    };
    loop();
  }

  watch(model) {
    this.#model = model;
    this.#scrapes = [];
    for (const points of Object.values(this.#series)) points.length = 0;
  }

  async #poll() {
    const model = this.#model;
    let scrape;
    try {
      scrape = { at: performance.now(), ...read(await metrics(AbortSignal.timeout(TIMEOUT_MS)), model) };
    } catch (error) {
      this.#scrapes = [];
      if (this.#missing !== error.status) this.#events.onAway(error);
      this.#missing = error.status;
      return;
    }
    if (model !== this.#model) return;
    if (this.#missing !== null) this.#events.onBack();
    this.#missing = null;
    const before = this.#scrapes.at(-1);
    // At the first scrape the version that the page has read may be an older one.
    if (scrape.version !== before?.version) this.#events.onVersion();
    this.#scrapes.push(scrape);
    if (this.#scrapes.length > SHARE_OVER + 1) this.#scrapes.shift();
    this.#show();
  }

  #since(scrapes) {
    const recent = this.#scrapes.slice(-scrapes - 1);
    return [recent[0], recent.at(-1)];
  }

  #show() {
    const [before, now] = this.#since(1);
    const seconds = (now.at - before.at) / 1000;
    const images = [...growth(before.images, now.images).values()].reduce((sum, each) => sum + each, 0);
    const rate = seconds ? images / seconds : 0;
    const [start, end] = this.#since(LATENCY_OVER);
    const latency = growth(start.latency, end.latency);
    const p50 = quantile(0.5, latency), p95 = quantile(0.95, latency);
    this.#gauge("rate", rate, rate.toFixed(rate && rate < 10 ? 1 : 0));
    this.#gauge("flight", now.inFlight, String(now.inFlight));
    this.#gauge("p50", p50, milliseconds(p50), "ms");
    this.#gauge("p95", p95, milliseconds(p95), "ms");
    this.#showShare();
  }

  #gauge(name, value, text, unit = "") {
    at(name).replaceChildren(text, ...(unit && value !== null ? [make("small", {}, ` ${unit}`)] : []));
    const points = this.#series[name];
    points.push(value ?? 0);
    if (points.length > SPARK_OVER) points.shift();
    const most = Math.max(...points, 1e-9), svg = at(`${name}-line`);
    svg.setAttribute("viewBox", `0 0 ${SPARK_OVER - 1} 100`);
    svg.setAttribute("preserveAspectRatio", "none");
    const first = SPARK_OVER - points.length;
    const path = points.map((point, index) => `${index ? "L" : "M"}${first + index} ${97 - (92 * point) / most}`);
    svg.replaceChildren(draw("path", { d: path.join("") }));
  }

  #showShare() {
    const [start, end] = this.#since(SHARE_OVER);
    const grown = [...growth(start.images, end.images)].filter(([, images]) => images > 0);
    const all = grown.reduce((sum, [, images]) => sum + images, 0);
    const rows = grown.sort((a, b) => b[1] - a[1]).slice(0, 6).map(([r, images]) => {
      const filled = make("span");
      filled.style.setProperty("--share", images / all);
      return make(
        "li", {}, make("span", {}, r === "schedule" ? "a list" : `r = ${r}`), make("span", { class: "track" }, filled),
        make("span", { class: "amount" }, `${Math.round((100 * images) / all)} %`),
      );
    });
    at("share").replaceChildren(...(rows.length ? rows : [make("li", { class: "none" }, "No images in the last half minute.")]));
  }
}

function milliseconds(seconds) {
  return seconds === null ? "–" : (1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0);
}
