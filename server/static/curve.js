// The measured curve: agreement with r = 0, or top-1, over images a second; a dot for each r.

import { at, draw, make, words } from "./dom.js";

const HIGH = 300, LEFT = 52, RIGHT = 56, TOP = 28, BOTTOM = 44; // pixels
const LABEL = 50; // pixels that a label is wide

/** Draws a curve, or says how to make one. */
export class Curve {
  #curve = null;
  #operating = null;
  #onChoose;

  /** @param onChoose Is told the r of a dot that was chosen. */
  constructor(onChoose) {
    this.#onChoose = onChoose;
    at("curve-what").addEventListener("change", () => this.#draw());
    addEventListener("resize", () => this.#curve?.rows.length && this.#draw());
  }

  /** Shows a curve (null: none has been measured) with the deployment's r marked. */
  show(curve, model) {
    this.#curve = curve;
    this.#operating = words(model.r);
    at("curve-what").hidden = !curve?.rows.some((row) => row.top1 !== null);
    if (curve?.rows.length) return this.#draw();
    at("curve-says").textContent = "";
    at("curve").replaceChildren(make(
      "div", { class: "empty" },
      "No curve of this model has been measured on this machine yet. A folder of photos, without labels, is enough:",
      make("code", {}, `tome-server calibrate --model ${model.source} --images FOLDER`),
    ));
  }

  /** Says that the curve could not be had. */
  fail(message) {
    at("curve").replaceChildren(make("div", { class: "empty" }, `The curve cannot be read: ${message}.`));
  }

  #draw() {
    const what = document.querySelector("input[name=what]:checked").value;
    const rows = this.#curve.rows.filter((row) => row[what] !== null).sort((a, b) => a.images_per_s - b.images_per_s);
    const low = Math.min(...rows.map((row) => (what === "agreement" ? row.agreement_interval[0] : row.top1)));
    const high = Math.max(...rows.map((row) => (what === "agreement" ? row.agreement_interval[1] : row.top1)));
    const wide = Math.max(at("curve").clientWidth, 260);
    const ys = ticks(low, high, 4), xs = ticks(rows[0].images_per_s, rows.at(-1).images_per_s, wide / 120);
    const x = (value) => LEFT + ((wide - LEFT - RIGHT) * (value - xs[0])) / (xs.at(-1) - xs[0]);
    const y = (value) => HIGH - BOTTOM - ((HIGH - TOP - BOTTOM) * (value - ys[0])) / (ys.at(-1) - ys[0]);
    const svg = draw("svg", { viewBox: `0 0 ${wide} ${HIGH}`, role: "group", "aria-label": "A dot for each r" });
    for (const tick of ys) {
      svg.append(
        draw("path", { class: "axis", d: `M${LEFT} ${y(tick)}H${wide - RIGHT}` }),
        draw("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, `${number(100 * tick)} %`),
      );
    }
    for (const tick of xs) {
      svg.append(draw("text", { x: x(tick), y: HIGH - BOTTOM + 20, "text-anchor": "middle" }, number(tick)));
    }
    svg.append(
      draw("text", { x: wide - RIGHT, y: HIGH - 4, "text-anchor": "end" }, "images/s"),
      draw("path", {
        class: "road", d: rows.map((row, i) => `${i ? "L" : "M"}${x(row.images_per_s)} ${y(row[what])}`).join(""),
      }),
      ...rows.map((row) => this.#dot(row, what, x, y)),
      ...this.#labels(rows, what, x, y),
    );
    at("curve").replaceChildren(svg);
    this.#say(rows.find((row) => words(row.r) === this.#operating));
  }

  #dot(row, what, x, y) {
    const [left, top] = [x(row.images_per_s), y(row[what])], here = words(row.r) === this.#operating;
    const dot = draw("g", { class: "dot", tabindex: 0, role: "button", "aria-label": `${this.#words(row)} Show it as A.` });
    if (what === "agreement") {
      const [from, to] = row.agreement_interval;
      dot.append(draw("path", { class: "whisker", d: `M${left} ${y(from)}V${y(to)}` }));
    }
    dot.append(
      draw("circle", { class: "reach", cx: left, cy: top, r: 16 }),
      draw("circle", { class: "point", cx: left, cy: top, r: 5 }),
    );
    if (here) dot.append(draw("circle", { class: "ring", cx: left, cy: top, r: 10 }));
    dot.addEventListener("pointerenter", () => this.#say(row));
    dot.addEventListener("focus", () => this.#say(row));
    dot.addEventListener("click", () => this.#onChoose(row.r));
    dot.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.#onChoose(row.r);
    });
    return dot;
  }

  /** Names the dots that have room for it, where the deployment stands first of all. */
  #labels(rows, what, x, y) {
    const named = [];
    const here = (row) => words(row.r) === this.#operating;
    for (const row of [...rows].sort((one, other) => here(other) - here(one))) {
      const left = x(row.images_per_s);
      if (named.some((other) => Math.abs(x(other.images_per_s) - left) < LABEL)) continue;
      named.push(row);
    }
    return named.map((row) => draw("text", {
      x: x(row.images_per_s) + 10, y: y(row[what]) - 9, class: here(row) ? "label here" : "label",
    }, `r = ${Array.isArray(row.r) ? "a list" : row.r}`));
  }

  #say(row) {
    const { device, precision, backend, measured, photos } = this.#curve;
    const how = `Measured ${measured} on ${photos} photos: ${device}, ${backend}, ${precision}.`;
    at("curve-says").textContent = row
      ? `${this.#words(row)} ${how}` : `${how} The deployment's r = ${this.#operating} is not among these.`;
  }

  #words(row) {
    const interval = row.agreement_interval.map((share) => number(100 * share)).join(" to ");
    const top1 = row.top1 === null ? "" : `, ${number(100 * row.top1)} % top-1`;
    const here = words(row.r) === this.#operating ? " The deployment stands here." : "";
    return `r = ${words(row.r)}: ${number(row.images_per_s)} images/s, ${row.tokens} tokens left, ` +
      `agrees with r = 0 on ${number(100 * row.agreement)} % (95 %: ${interval})${top1}.${here}`;
  }
}

/** Round numbers that reach from below the least to above the greatest. */
function ticks(low, high, about) {
  const span = Math.max(high - low, Math.abs(high) * 1e-3, 1e-6);
  const rough = span / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((each) => each >= rough);
  const from = Math.floor(low / step + 1e-9), to = Math.max(Math.ceil(high / step - 1e-9), from + 1);
  return Array.from({ length: to - from + 1 }, (_, index) => (from + index) * step);
}

function number(value) {
  return String(Number(value.toPrecision(3)));
}
